"""The command line behind `eval_long_bench.py`: scores of a run's folder, to result.json and a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..shared.errors import UserError
from ..shared.options import OUTPUT_DIR
from ..shared.scores import (
    find_folder,
    no_predictions,
    print_incomplete,
    print_table,
    read_config,
    row_status,
)
from ..shared.store import CONFIG, replace_file
from .scoring import BUCKETS, read_predictions, score, score_by_length
from .tasks import ENGLISH, NAMES, Task, longbench_tasks, task_from_description


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    parser = argparse.ArgumentParser(
        prog="eval_long_bench.py", description="Score the predictions of a LongBench run.", allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, help="the run's folder under pred/ (or pred_e/), or its path"
    )
    parser.add_argument("--e", action="store_true", help="LongBench-E: look in pred_e/, score by length")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where pred/ and pred_e/ are")
    args = parser.parse_args(argv)
    try:
        runs = args.output_dir / ("pred_e" if args.e else "pred")
        _evaluate(find_folder(runs, args.model), longbench_e=args.e)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(folder: Path, *, longbench_e: bool) -> None:
    config = _read_config(folder, longbench_e=longbench_e)
    datasets = config.get("datasets", {})
    known = longbench_tasks()
    for name, entry in datasets.items():
        if name not in known:
            known[name] = task_from_description(name, entry.get("task"), str(folder / CONFIG))

    files = {path.stem: path for path in folder.glob("*.jsonl")}
    unknown = sorted(set(files) - set(known))
    if unknown:
        raise UserError(
            f"{folder}: no metric is known for {', '.join(unknown)}; expected files of {', '.join(known)}"
        )
    results: dict[str, float | dict] = {}
    table, incomplete = [], []
    for name in [name for name in known if name in files or name in datasets]:
        predictions = read_predictions(files[name]) if name in files else None
        rows = len(predictions.answers) if predictions else 0
        status, complete = row_status(rows, datasets.get(name))
        if not complete:
            incomplete.append(f"{name}: {status}")
        if rows:
            results[name] = _score(known[name], predictions, files[name], longbench_e=longbench_e)
        table.append((name, known[name].metric, status, results.get(name)))
    if not results:
        raise no_predictions(folder)
    replace_file(folder / "result.json", json.dumps(results, ensure_ascii=False, indent=4) + "\n")
    _print(table, results, longbench_e=longbench_e)
    print(f"written to {folder / 'result.json'}")
    print_incomplete(incomplete)


def _read_config(folder: Path, *, longbench_e: bool) -> dict:
    config = read_config(folder)
    if config is None:
        print(f"note: {folder} has no {CONFIG}; whether its files are complete is not known")
        return {}
    if config.get("benchmark") == "ruler":
        raise UserError(f"{folder} is a run of RULER: score it with eval_ruler.py --model {folder}")
    if (config.get("benchmark") == "longbench-e") != longbench_e:
        raise UserError(
            f"{folder} is a run of {config.get('benchmark')}: "
            f"score it {'without' if longbench_e else 'with'} --e"
        )
    return config


def _score(task: Task, predictions, path: Path, *, longbench_e: bool) -> float | dict:
    try:
        return (score_by_length if longbench_e else score)(task, predictions)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be scored: {error}") from None


def _print(table: list[tuple], results: dict, *, longbench_e: bool) -> None:
    columns = BUCKETS if longbench_e else ("score",)
    lines = [("data set", "metric", "rows", *columns)]
    for name, metric, status, result in table:
        values = result.values() if isinstance(result, dict) else [result] * len(columns)
        lines.append((name, metric, status, *("-" if value is None else f"{value:.2f}" for value in values)))
    lines += _averages(results, longbench_e=longbench_e)
    print_table(lines, left=3)


def _averages(results: dict, *, longbench_e: bool) -> list[tuple]:
    if longbench_e:
        means = []
        for bucket in BUCKETS:
            values = [result[bucket] for result in results.values() if result[bucket] is not None]
            means.append(f"{sum(values) / len(values):.2f}" if values else "-")
        return [("average", "", f"{len(results)} data sets", *means)]
    lines = []
    if set(ENGLISH) <= set(results) and set(results) != set(ENGLISH):
        mean = sum(results[name] for name in ENGLISH) / len(ENGLISH)
        lines.append(("average, English", "", f"{len(ENGLISH)} data sets", f"{mean:.2f}"))
    others = len([name for name in results if name not in NAMES])
    label = "average" if not others or others == len(results) else "average of all"
    mean = sum(results.values()) / len(results)
    return [*lines, (label, "", f"{len(results)} data sets", f"{mean:.2f}")]
