"""Set scored runs side by side: a table, and a bar chart with --plot.

    python summarize.py pred/A pred/B pred/C --plot sweep.png

Each argument is a run's folder with the config.json and result.json that prediction and scoring left there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path


class Unusable(Exception):
    """A folder that cannot be summarised, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A scored run: what it was, and its score in percent by data set."""

    label: str
    model: str
    rows: dict[str, int]
    scores: dict[str, float]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises
    ------
    Unusable
        If it was not predicted or not scored, or was scored by length (LongBench-E).
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scores = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unusable(
            f"{error.filename} is missing; predict with long_test.sh, then: "
            f"python eval_long_bench.py --model {folder}"
        ) from None
    except ValueError as error:
        raise Unusable(f"{folder}: config.json or result.json is not valid JSON: {error}") from None
    if any(isinstance(value, dict) for value in scores.values()):
        raise Unusable(f"{folder} is scored by length (--e); summarise runs of plain LongBench")
    rows = {name: entry["expected"] for name, entry in config.get("datasets", {}).items()}
    return Run(label_of(config), str(config["model"]), rows, scores)


def label_of(config: dict) -> str:
    """A run in a few words: `dense`, or `K 0.7 V 0.7` with whatever is not the default."""
    if config["mode"] == "dense":
        return "dense"
    label = f"K {config['k_sparsity']:g} V {config['v_sparsity']:g}"
    if (config["k_rule"], config["v_rule"]) != ("Kt_Mag", "Vt_Mag"):
        label += f" {config['k_rule']}+{config['v_rule']}"
    if config["backend"] != "kernel":
        label += f" {config['backend']}"
    if config["residual_length"] != 32:
        label += f" window {config['residual_length']}"
    return label


def average(run: Run, tasks: list[str]) -> float:
    return sum(run.scores[task] for task in tasks) / len(tasks)


def table(runs: list[Run], tasks: list[str]) -> str:
    """A Markdown table, a row a data set and a column a run."""
    lines = [["data set", "rows", *(run.label for run in runs)]]
    lines += [
        [task, str(runs[0].rows.get(task, "-")), *(f"{run.scores[task]:.2f}" for run in runs)]
        for task in tasks
    ]
    lines.append(["average", "", *(f"{average(run, tasks):.2f}" for run in runs)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def plot(runs: list[Run], tasks: list[str], path: Path) -> None:
    """Bars by data set, one colour a run, and the average at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.6 + 1.5 * (len(tasks) + 1), 4.2), layout="constrained")
    width = 0.8 / len(runs)
    colours = pyplot.get_cmap("viridis")
    for i, run in enumerate(runs):
        values = [*(run.scores[task] for task in tasks), average(run, tasks)]
        places = [n + (i - (len(runs) - 1) / 2) * width for n in range(len(values))]
        bars = axes.bar(
            places, values, width * 0.92, label=run.label, color=colours(0.15 + 0.7 * i / len(runs))
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "average"], rotation=15, ha="right")
    axes.axvline(len(tasks) - 0.5, color="0.7", linewidth=1)
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 108)
    axes.set_title(f"{Path(runs[0].model).name}: LongBench-format scores by KV-cache sparsity", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(6, len(runs)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bars to this PNG, PDF or SVG")
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot must end in .png, .pdf or .svg, got {args.plot}")
    try:
        runs = [read_run(folder) for folder in args.runs]
        models = sorted({run.model for run in runs})
        if len(models) > 1:
            raise Unusable(f"the runs are of different models: {', '.join(models)}")
        tasks = [task for task in runs[0].scores if all(task in run.scores for run in runs)]
        if not tasks:
            raise Unusable("the runs have no data set in common")
        left_out = sorted({task for run in runs for task in run.scores} - set(tasks))
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(runs, tasks))
    if left_out:
        print(f"left out, not in every run: {', '.join(left_out)}")
    if args.plot:
        plot(runs, tasks, args.plot)
        print(f"\nplot: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
