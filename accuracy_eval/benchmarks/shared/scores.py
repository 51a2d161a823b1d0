"""What the scoring command lines share: finding a run, reading its lines, saying what is missing, a table."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError
from .store import CONFIG, is_joined


def find_folder(runs: Path, name: str) -> Path:
    """Return the run's folder: `runs/name`, or `name` as a path.

    Raises
    ------
    UserError
        If there is none; the message lists the folders in `runs`.
    """
    for folder in (runs / name, Path(name)):
        if folder.is_dir():
            return folder
    there = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    raise UserError(f"no folder {runs / name}; there are: {', '.join(there) or 'none'}")


def read_config(folder: Path) -> dict | None:
    """Return the folder's config.json, None where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_records(path: Path, keys: tuple[str, ...]) -> list[dict]:
    """Read the complete lines of a prediction file.

    Raises
    ------
    UserError
        With the file and the line, if a line is not an object, lacks one of `keys`, or `answers` is no list.
    """
    # A run ends every line: what follows the last line feed was cut off while it was written.
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        if not isinstance(row["answers"], list):
            raise UserError(f"{where}: answers must be a list of strings")
        rows.append(row)
    return rows


def row_status(rows: int, entry: dict | None) -> tuple[str, bool]:
    """Return how many rows of how many there are, and whether the run has made all it was asked for."""
    if entry is None:
        return f"{rows} rows", True
    of = f"{rows} of {entry['expected']} rows"
    if entry["expected"] < entry["rows"]:
        of += f" (limited; the data has {entry['rows']})"
    return of, rows >= entry["expected"]


def print_table(lines: list[tuple[str, ...]], left: int) -> None:
    """Print aligned columns, the first line as the head, `left` columns flush left and the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def no_predictions(folder: Path) -> UserError:
    """Return what to say of a run without a line to score."""
    if not is_joined(folder):
        return UserError(
            f"{folder} was begun by several processes, which are not done; the command of the run makes what "
            "is missing"
        )
    return UserError(f"{folder} holds no predictions")


def print_incomplete(incomplete: list[str]) -> None:
    """Say which data sets the run has not finished."""
    if incomplete:
        print("INCOMPLETE: scores are of the rows there are; the command of the run makes the others")
        print("\n".join(f"  {line}" for line in incomplete))
