"""CSV, tables and plots of what was measured. Several runs become one table with

python -m benchmarks.speed.report a/mem_spd.csv b/mem_spd.csv --out speed [--context 8192]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..shared.errors import UserError

Row = dict[str, Any]
FIELDS = (
    "section model ranks mode batch context new_tokens ttft_s ms_step ms_median ms_p20 ms_p80 floor_ms times_floor "
    "tokens_per_s tokens_per_s_with_prompt kv_bytes kv_formula peak_bytes prefill_peak_bytes setup_s note device "
    "dtype torch transformers commit date"
).split()
TEXTS = set("section model mode note device dtype torch transformers commit date".split())
COLOURS = {
    "dense": "#949494",
    "dense-static": "#ca9161",
    "dense-flash": "#029e73",
    "dense-cudnn": "#00634a",
    "dense-compiled": "#7fbf9f",
}
PRUNED = ("#0173b2", "#de8f05", "#cc78bc", "#56b4e9")


def machine(device: torch.device, dtype: str) -> Row:
    """What a row must say of where it was measured."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": name,
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _short(value) for key, value in row.items() if value is not None})


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV that `write_csv` wrote, cells without a value left out.

    Raises
    ------
    UserError
        If the file is not there or another table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {k: _value(k, v) for k, v in row.items() if v not in ("", None)}
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not a table of mem_spd_test.py") from None
    for row in rows:
        if not {"section", "mode", "batch", "context"} <= row.keys() <= set(FIELDS):
            raise UserError(f"{path}: not a table of mem_spd_test.py")
    return [{"ranks": 1} | row for row in rows]  # what older tables did not say


def _value(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    return int(text) if text.isdigit() else float(text)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def measured(row: Row) -> bool:
    """Whether there are figures; the note of other rows says why not."""
    return "tokens_per_s" in row


def line(row: Row) -> str:
    """A row in a few words, for the terminal."""
    text = f"{row['mode']:<22} batch {row['batch']:<4} context {row['context']:<7}"
    if not measured(row):
        return f"{text} {row['note']}"
    if row["section"] == "generation":
        text += f" TTFT {row['ttft_s']:.3f} s, {row['new_tokens']} new: {row['tokens_per_s']:.1f} tokens/s"
        text += f" ({row['ms_step']:.2f} ms a step)"
    else:
        text += f" {row['ms_step']:.3f} ms a step ({row['times_floor']:.2f}x floor)"
        text += f", {row['tokens_per_s']:.0f} tokens/s"
    if row.get("kv_bytes"):
        text += (
            f", KV {row['kv_bytes'] / 2**30:.2f} GiB ({row['kv_bytes'] / row['kv_formula']:.3f} of formula)"
        )
    if row.get("peak_bytes"):
        text += f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return text


def comparison(rows: Sequence[Row]) -> str:
    """Step times of all modes side by side, with tokens per second relative to each dense mode."""
    parts = [row for row in rows if row["section"] == "steps" and measured(row)]
    lines = []
    for key in dict.fromkeys((row["ranks"], row["batch"], row["context"]) for row in parts):
        ranks, batch, context = key
        where = f"{ranks} ranks, " if ranks > 1 else ""
        group = {row["mode"]: row for row in parts if (row["ranks"], row["batch"], row["context"]) == key}
        dense = [name for name in group if name.startswith("dense")]
        for name, row in group.items():
            if not name.startswith("dense"):
                ratios = ", ".join(f"{group[d]['ms_step'] / row['ms_step']:.2f}x {d}" for d in dense)
                time = f"{name} {row['ms_step']:.3f} ms"
                lines.append(f"{where}batch {batch}, {context} tokens: {time}: {ratios or 'alone'}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Tokens per second against batch and against new tokens; the files written.

    A plot is of one number of ranks, the first row's.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in rows if row["ranks"] == rows[0]["ranks"]]
    steps = [row for row in rows if row["section"] in ("steps", "largest") and measured(row)]
    generated = [row for row in rows if row["section"] == "generation" and measured(row)]
    written = []
    if steps:
        written.append(_lines(steps, "batch", "batch size", "tokens_per_s", folder / "throughput_batch.png"))
    if generated:
        path = folder / "throughput_new_tokens.png"
        written.append(_bars(generated, path))
    return written


def _colour(mode: str, modes: Sequence[str]) -> str:
    pruned = [name for name in modes if name not in COLOURS]
    return COLOURS.get(mode) or PRUNED[pruned.index(mode) % len(PRUNED)]


def _figure(rows: Sequence[Row]):
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    first = rows[0]
    device = first["device"] if first["ranks"] == 1 else f"{first['ranks']} x {first['device']}"
    axis.set_title(f"{first['model']}, {first['dtype']}, {device}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    return figure, axis


def _lines(rows: Sequence[Row], x: str, label: str, y: str, path: Path) -> Path:
    from matplotlib import ticker

    figure, axis = _figure(rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    for mode in modes:
        for number, context in enumerate(contexts):
            points = sorted((r[x], r[y]) for r in rows if (r["mode"], r["context"]) == (mode, context))
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    linestyle=("-", "--", ":", "-.")[number % 4],
                    color=_colour(mode, modes),
                    label=f"{mode}, {context} tokens",
                )
    ticks = sorted({row[x] for row in rows})
    axis.set_xscale("log", base=2)
    # Of largest batches that all but agree, only the largest: their labels would lie on each other.
    apart = [
        tick for tick, above in zip(ticks, [*ticks[1:], float("inf")], strict=True) if above > 1.1 * tick
    ]
    axis.set_xticks(apart, [str(tick) for tick in apart], fontsize=8)
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_ylim(bottom=0)
    axis.set_xlabel(label)
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _bars(rows: Sequence[Row], path: Path) -> Path:
    figure, axis = _figure(rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    groups = list(dict.fromkeys((row["batch"], row["context"], row["new_tokens"]) for row in rows))
    width = 0.8 / len(modes)
    for number, mode in enumerate(modes):
        found = {
            (r["batch"], r["context"], r["new_tokens"]): r["tokens_per_s"] for r in rows if r["mode"] == mode
        }
        places = [i + (number - (len(modes) - 1) / 2) * width for i, key in enumerate(groups) if key in found]
        heights = [found[key] for key in groups if key in found]
        axis.bar(places, heights, width, color=_colour(mode, modes), label=mode)
    axis.set_xticks(range(len(groups)), [f"batch {b}\n{c} + {n}" for b, c, n in groups], fontsize=8)
    axis.set_xlim(-0.8, len(groups) - 0.2)
    axis.set_xlabel("prompt + new tokens")
    axis.set_ylabel("tokens per second while decoding")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Put the tables of several runs together, in that order, and draw them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.report", description=main.__doc__)
    parser.add_argument("tables", nargs="+", type=Path, help="mem_spd.csv of runs")
    parser.add_argument("--out", type=Path, default=Path("speed"), help="folder for mem_spd.csv and plots")
    parser.add_argument(
        "--context", nargs="+", type=int, help="draw these contexts only; the table keeps all (default: all)"
    )
    args = parser.parse_args(arguments)
    try:
        rows = [row for path in args.tables for row in read_csv(path)]
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.out / "mem_spd.csv")
    print(comparison(rows))
    drawn = [row for row in rows if args.context is None or row["context"] in args.context]
    print("written: " + ", ".join(map(str, [args.out / "mem_spd.csv", *draw(drawn, args.out)])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
