"""The command line behind `eval_ruler.py`: scores of a run's folder, to result.json and a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..shared.errors import UserError
from ..shared.options import OUTPUT_DIR
from ..shared.run import command
from ..shared.scores import (
    find_folder,
    no_predictions,
    print_incomplete,
    print_table,
    read_config,
    row_status,
)
from ..shared.store import CONFIG, replace_file
from .predict import RUNS
from .scoring import percent, row_scores
from .tasks import TASKS, data_name, parse_data_name


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    parser = argparse.ArgumentParser(
        prog="eval_ruler.py", description="Score the predictions of a RULER run.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help=f"the run's folder under {RUNS}/, or its path")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where {RUNS}/ is")
    args = parser.parse_args(argv)
    return command(lambda: _evaluate(find_folder(args.output_dir / RUNS, args.model)))


def _evaluate(folder: Path) -> None:
    config = read_config(folder)
    if config is None:
        print(f"note: {folder} has no {CONFIG}; whether its files are complete is not known")
        config = {"benchmark": "ruler"}
    if config.get("benchmark") != "ruler":
        raise UserError(f"{folder} is a run of {config.get('benchmark')}: score it with eval_long_bench.py")
    files = {path.stem: path for path in folder.glob("*.jsonl")}
    datasets = config.get("datasets", {})
    unknown = sorted(name for name in {*files, *datasets} if parse_data_name(name) is None)
    if unknown:
        raise UserError(
            f"{folder}: {', '.join(unknown)} is not <task>_<length>.jsonl; tasks are {', '.join(TASKS)}"
        )
    found = {(task.name, length) for task, length in map(parse_data_name, {*files, *datasets})}
    lengths = sorted({length for _, length in found})
    results: dict[str, float] = {}
    incomplete = []
    for length in lengths:
        for task in TASKS.values():
            name = data_name(task, length)
            if (task.name, length) not in found:
                continue
            scores = row_scores(task, files[name]) if name in files else []
            status, complete = row_status(len(scores), datasets.get(name))
            if not complete:
                incomplete.append(f"{name}: {status}")
            if scores:
                results[name] = percent(scores)
    if not results:
        raise no_predictions(folder)
    replace_file(folder / "result.json", json.dumps(results, indent=4) + "\n")
    _print(results, lengths)
    noise = [
        name
        for name, entry in datasets.items()
        if TASKS[parse_data_name(name)[0].name].takes_essays
        and entry.get("task", {}).get("haystack") == "noise"
    ]
    if noise:
        print(
            "note: essay haystacks are the noise sentence (no --essays): not comparable to published scores"
        )
    print(f"written to {folder / 'result.json'}")
    print_incomplete(incomplete)


def _print(results: dict[str, float], lengths: list[int]) -> None:
    """Print tasks by lengths; a length's average is of its scored tasks, whose number stands below."""
    lines = [("task", "metric", *(str(length) for length in lengths))]
    columns: list[list[float]] = [[] for _ in lengths]
    for task in TASKS.values():
        scores = [results.get(data_name(task, length)) for length in lengths]
        for column, value in zip(columns, scores, strict=True):
            if value is not None:
                column.append(value)
        if any(value is not None for value in scores):
            cells = ("-" if value is None else f"{value:.2f}" for value in scores)
            lines.append((task.name, task.metric, *cells))
    means = (f"{sum(column) / len(column):.2f}" if column else "-" for column in columns)
    lines.append(("average", "", *means))
    lines.append(("tasks in it", "", *(f"{len(column)} of {len(TASKS)}" for column in columns)))
    print_table(lines, left=2)
