"""The command line behind `eval_long_bench.py`: scores of a run's folder, to result.json and a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .errors import UserError
from .scoring import BUCKETS, read_predictions, score, score_by_length
from .settings import OUTPUT_DIR
from .store import CONFIG, replace_file
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
        _evaluate(_folder(args), longbench_e=args.e)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _folder(args: argparse.Namespace) -> Path:
    runs = args.output_dir / ("pred_e" if args.e else "pred")
    for folder in (runs / args.model, Path(args.model)):
        if folder.is_dir():
            return folder
    there = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    raise UserError(f"no folder {runs / args.model}; there are: {', '.join(there) or 'none'}")


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
        status, complete = _status(rows, datasets.get(name))
        if not complete:
            incomplete.append(f"{name}: {status}")
        if rows:
            results[name] = _score(known[name], predictions, files[name], longbench_e=longbench_e)
        table.append((name, known[name].metric, status, results.get(name)))
    if not results:
        raise UserError(f"{folder} holds no predictions")
    replace_file(folder / "result.json", json.dumps(results, ensure_ascii=False, indent=4) + "\n")
    _print(table, results, longbench_e=longbench_e)
    print(f"written to {folder / 'result.json'}")
    if incomplete:
        print("INCOMPLETE: scores are of the rows there are; the command of the run makes the others")
        print("\n".join(f"  {line}" for line in incomplete))


def _read_config(folder: Path, *, longbench_e: bool) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        print(f"note: {folder} has no {CONFIG}; whether its files are complete is not known")
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if (config.get("benchmark") == "longbench-e") != longbench_e:
        raise UserError(
            f"{folder} is a run of {config.get('benchmark')}: "
            f"score it {'without' if longbench_e else 'with'} --e"
        )
    return config


def _status(rows: int, entry: dict | None) -> tuple[str, bool]:
    """Return how many rows of how many there are, and whether the run has made all it was asked for."""
    if entry is None:
        return f"{rows} rows", True
    of = f"{rows} of {entry['expected']} rows"
    if entry["expected"] < entry["rows"]:
        of += f" (limited; the data has {entry['rows']})"
    return of, rows >= entry["expected"]


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
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


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
