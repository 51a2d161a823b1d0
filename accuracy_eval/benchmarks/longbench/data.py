"""LongBench's rows: from a folder of JSON lines, or out of the benchmark's data.zip on the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import string
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..shared.errors import UserError
from .tasks import NAMES, Task

HUB_REPOSITORY = "THUDM/LongBench"
HUB_FILE = "data.zip"
#: Where a download by hand may be unpacked (it holds `data/<data set>.jsonl`) and is then found by itself.
DEFAULT_DIR = Path(__file__).resolve().parents[2] / "data"


@dataclass(frozen=True)
class Rows:
    """The rows of one data set, with the digest of the file they came from."""

    rows: list[dict]
    source: str
    sha256: str


def file_name(task: Task, *, longbench_e: bool) -> str:
    """Return the name of the task's data file; LongBench-E's have a suffix."""
    return f"{task.name}_e.jsonl" if longbench_e else f"{task.name}.jsonl"


def find_file(data_dir: Path, name: str) -> Path | None:
    """Return `data_dir/name` or `data_dir/data/name`, whichever is there."""
    return next((path for path in (data_dir / name, data_dir / "data" / name) if path.is_file()), None)


def load_rows(task: Task, data_dir: Path | None, *, longbench_e: bool) -> Rows:
    """Read and check the rows of one data set.

    Parameters
    ----------
    task
        The data set.
    data_dir
        Folder with `<data set>.jsonl` or `data/<data set>.jsonl`; None: `accuracy_eval/data`, then the hub.
    longbench_e
        Whether the rows of LongBench-E are wanted.

    Raises
    ------
    UserError
        If the file is not found or a line is malformed; the message names file and line.
    """
    name = file_name(task, longbench_e=longbench_e)
    if data_dir is not None:
        path = find_file(data_dir, name)
        if path is None:
            stems = {p.stem for folder in (data_dir, data_dir / "data") for p in folder.glob("*.jsonl")}
            there = sorted(s.removesuffix("_e") for s in stems if s.endswith("_e") == longbench_e)
            raise UserError(
                f"no {name} in {data_dir} or {data_dir / 'data'}; put it there, or choose with --datasets from "
                f"what is there: {', '.join(there) or 'nothing'}"
            )
    else:
        path = find_file(DEFAULT_DIR, name)
    if path is not None:
        content, source = path.read_bytes(), str(path)
    else:
        archive = _download()
        source = f"{archive}:data/{name}"
        try:
            with zipfile.ZipFile(archive) as file:
                content = file.read(f"data/{name}")
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive} does not hold data/{name}: {error}") from None
    rows = parse_rows(content, source, task)
    official = official_rows(task.name)
    if official and not longbench_e and len(rows) < official:
        print(
            f"note: {source} holds {len(rows)} of the {official} rows of {task.name}: its score is not LongBench's; "
            "the whole file is in the hub's data.zip"
        )
    return Rows(rows, source, hashlib.sha256(content).hexdigest())


def official_rows(name: str) -> int | None:
    """Return how many rows a data set of LongBench has; None for another."""
    return {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}.get(name, 200) if name in NAMES else None


@functools.cache
def _download() -> str:
    from huggingface_hub import hf_hub_download

    print(f"looking for {HUB_FILE} of {HUB_REPOSITORY} in the hub's cache and on the hub", file=sys.stderr)
    try:
        return hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset")
    except Exception as error:
        raise UserError(
            f"LongBench's data is not here and cannot be downloaded ({type(error).__name__}).\n"
            "Where there is a network, download\n"
            f"  https://huggingface.co/datasets/{HUB_REPOSITORY}/resolve/main/{HUB_FILE}\n"
            f"and unpack it so that {DEFAULT_DIR}/narrativeqa.jsonl exists,\n"
            "or anywhere, and pass --data_dir FOLDER (it holds <data set>.jsonl or data/<data set>.jsonl)"
        ) from None


def parse_rows(content: bytes, source: str, task: Task) -> list[dict]:
    """Parse JSON lines. Only a line feed ends one (U+2028 occurs inside rows); empty ones are skipped.

    Raises
    ------
    UserError
        With `source` and the line's number, if a line is not JSON, lacks a key or has a wrong type.
    """
    keys = ["answers", "length", "all_classes"]
    keys += [field for _, field, _, _ in string.Formatter().parse(task.prompt) if field and field not in keys]
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of the JSON or of its encoding
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(
                f"{where}: missing {', '.join(missing)}; a row of {task.name} needs {', '.join(keys)}"
            )
        if not _is_strings(row["answers"]):
            raise UserError(f"{where}: answers must be a list of strings, got {row['answers']!r:.80}")
        if row["all_classes"] is not None and not _is_strings(row["all_classes"]):
            raise UserError(f"{where}: all_classes must be null or a list of strings")
        if not isinstance(row["length"], int | float):
            raise UserError(f"{where}: length must be a number, got {row['length']!r:.80}")
        rows.append(row)
    if not rows:
        raise UserError(f"{source} holds no rows")
    return rows


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
