"""The folder of a run: its config, and predictions that survive a kill at any moment.

A batch of rows is one write of complete lines, then an fsync. A kill can leave at most one unfinished last line,
which the next run drops; every line carries its row's index (`_index`), so a resumed run knows what is done.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from .errors import UserError

CONFIG = "config.json"


class RunFolder:
    """Output folder of one configuration, locked while a run writes to it.

    Parameters
    ----------
    path
        The folder, made if it does not exist.
    identity
        What must be equal for two runs to share the folder.

    Raises
    ------
    UserError
        If the folder is another configuration's, another process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path, identity: dict) -> None:
        self.path = path
        self.identity = identity
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {path} ({error.strerror}); give another --output_dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing to {path}; wait for it or end it") from None
        self.config = self._read_config()
        self._compare(
            "", {key: self.config.get(key) for key in identity} if self.config else identity, identity
        )

    def _read_config(self) -> dict:
        path = self.path / CONFIG
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is not valid JSON ({error}); {self._remedy()}") from None
        if any(self.path.glob("*.jsonl")):
            raise UserError(f"{self.path} holds predictions but no {CONFIG}; {self._remedy()}")
        return {}

    def _remedy(self) -> str:
        return "remove that folder, or choose another --output_dir"

    def _compare(self, of: str, found: dict, wanted: dict) -> None:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            lines = [f"  {of}{key}: there {found.get(key)!r}, now {wanted[key]!r}" for key in differing]
            raise UserError(
                f"{self.path}\nholds a run of another configuration:\n"
                + "\n".join(lines)
                + f"\n{self._remedy()}"
            )

    def add_datasets(self, datasets: dict[str, dict], environment: dict) -> None:
        """Record the data sets of this run and its environment in the config.

        Parameters
        ----------
        datasets
            Name -> {"rows", "expected", "sha256", "task"}; a data set that is there already must have the
            same data and task.
        environment
            Versions and device of this run; kept for the reader, not compared.
        """
        known = dict(self.config.get("datasets", {}))
        for name, entry in datasets.items():
            if name in known:
                same = ("sha256", "task")
                self._compare(
                    f"{name}.", {key: known[name].get(key) for key in same}, {k: entry[k] for k in same}
                )
                entry = entry | {"expected": max(entry["expected"], known[name].get("expected", 0))}
            known[name] = entry
        self.config = {**self.identity, "datasets": known, "environment": environment}
        replace_file(self.path / CONFIG, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def predictions(self, name: str) -> PredictionFile:
        """Open the predictions of one data set."""
        return PredictionFile(self.path / f"{name}.jsonl")

    def close(self) -> None:
        """Give the lock up."""
        self._lock.close()


class PredictionFile:
    """Append-only JSON lines. Opening drops an unfinished last line and reads which rows are done.

    Raises
    ------
    UserError
        If a finished line is not a prediction, or two lines are of the same row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        self.done: set[int] = set()
        for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                index = json.loads(line)["_index"]
            except (ValueError, KeyError, TypeError):
                index = None
            if not isinstance(index, int):
                raise UserError(f"{path}, line {number}: not a prediction of this program; remove the file")
            if index in self.done:
                raise UserError(f"{path}, line {number}: row {index} is there twice; remove one of the lines")
            self.done.add(index)

    def append(self, *records: dict) -> None:
        """Write records and return when they are on the disk; on a full disk leave the file as it was."""
        size = os.fstat(self._file).st_size
        lines = b"".join(map(_line, records))
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.done.update(record["_index"] for record in records)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _line(record: dict) -> bytes:
    try:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold but UTF-8 may not
        line = json.dumps(record).encode("ascii")
    return line + b"\n"


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run after a kill, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
