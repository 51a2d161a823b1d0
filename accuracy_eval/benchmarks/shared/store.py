"""The folder of a run: its config, and predictions that survive a kill at any moment.

A batch of rows is one write of complete lines, then an fsync. A kill can leave at most one unfinished last line,
which the next run drops; every line carries its row's index (`_index`), so a resumed run knows what is done.
Of several processes each writes to `parts/<data set>/<rank>of<world>.jsonl`; who finds all rows there joins them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .shards import Shard

CONFIG = "config.json"
#: Folder, in a run's, of what each of several processes has made.
PARTS = "parts"


class RunFolder:
    """Output folder of one configuration, locked while a run, of one process or of several, writes to it.

    Parameters
    ----------
    path
        The folder, made if it does not exist.
    identity
        What must be equal for two runs to share the folder.
    shard
        This process's share of the run.

    Raises
    ------
    UserError
        If the folder is another configuration's, another process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path, identity: dict, shard: Shard = Shard()) -> None:  # noqa: B008 (frozen)
        self.path = path
        self.identity = identity
        self.shard = shard
        self._locks = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Processes of one run share the folder's lock; each has that of its rank.
            self._locks.append((path / ".lock").open("w"))
            if shard.world > 1:
                self._locks.append((path / f".lock.{shard.name}").open("w"))
        except OSError as error:
            raise UserError(f"cannot write to {path} ({error.strerror}); give another --output_dir") from None
        try:
            for number, lock in enumerate(self._locks, start=1):
                alone = number == len(self._locks)
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {path}; wait for it or end it") from None
        except OSError as error:  # as on a network file system without locks
            raise UserError(f"cannot lock {path} ({error.strerror}); give another --output_dir") from None
        if shard.world == 1:  # nobody else writes here, so these are of runs that were killed
            for name in (CONFIG, "*.jsonl"):
                for temporary in path.glob(f".{name}.*.tmp"):
                    temporary.unlink(missing_ok=True)
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
            Versions and device of this run; kept for the reader, not compared. A run that finds every row
            there leaves the environment that made them; one that adds rows keeps what others were made in
            under "earlier".
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
        environment = self._environment(environment, known)
        self.config = {**self.identity, "datasets": known, "environment": environment}
        replace_file(self.path / CONFIG, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def _environment(self, now: dict, datasets: dict[str, dict]) -> dict:
        """What the rows that are there, and those that this run will add, are made in."""
        before = self.config.get("environment")
        done = {name: len(self.done(name)) for name in datasets} if before else {}
        if not any(done.values()):
            return now
        if all(done[name] >= entry["expected"] for name, entry in datasets.items()):
            return before
        others = [{key: before[key] for key in before if key != "earlier"}, *before.get("earlier", [])]
        earlier = [other for other in others if other | {"date": None} != now | {"date": None}]
        # Of runs in one environment the first one's date stands.
        first = min([now, *(other for other in others if other not in earlier)], key=lambda one: one["date"])
        return first | ({"earlier": earlier} if earlier else {})

    def predictions(self, name: str) -> PredictionFile:
        """Open the file that this process adds predictions of one data set to."""
        if self.shard.world == 1:
            return PredictionFile(self.path / f"{name}.jsonl")
        folder = self._parts(name)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return PredictionFile(folder / f"{self.shard.name}.jsonl")

    def done(self, name: str) -> set[int]:
        """Return the rows of one data set that are predicted, by whatever process."""
        return set(self._lines(name))

    def _parts(self, name: str) -> Path:
        return self.path / PARTS / name

    def _lines(self, name: str) -> dict[int, bytes]:
        """Row -> its line, without the line feed."""
        found: dict[int, bytes] = {}
        # The joined file last: parts vanish once they are in it.
        for path in (*sorted(self._parts(name).glob("*.jsonl")), self.path / f"{name}.jsonl"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            found = _indexed(path, content) | found
        return found

    def join(self) -> list[str]:
        """Join the parts of data sets of which all rows are there; return the names of those that lack some."""
        if self.shard.world == 1 and is_joined(self.path):
            return []
        missing = []
        with _writing(self.path), (self.path / ".lock.join").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name, entry in self.config["datasets"].items():
                lines = self._lines(name)
                if len(lines) < entry["expected"]:
                    missing.append(name)
                elif parts := list(self._parts(name).glob("*.jsonl")):
                    whole = b"".join(lines[index] + b"\n" for index in sorted(lines))
                    replace_file(self.path / f"{name}.jsonl", whole)
                    for path in parts:
                        path.unlink()
            if not missing:
                shutil.rmtree(self.path / PARTS, ignore_errors=True)
                for path in self.path.glob(".lock.*of*"):
                    path.unlink(missing_ok=True)
        return missing

    def close(self) -> None:
        """Give the lock up."""
        for lock in self._locks:
            lock.close()


class PredictionFile:
    """Append-only JSON lines. Opening drops an unfinished last line and reads which rows are done.

    Raises
    ------
    UserError
        If a finished line is not a prediction, two lines are of the same row, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        self.done = set(_indexed(path, content))

    def append(self, *records: dict) -> None:
        """Write records and return when they are on the disk.

        Raises
        ------
        UserError
            If the disk is full or fails; the file is as it was.
        """
        size = os.fstat(self._file).st_size
        with _writing(self.path):
            try:
                _write(self._file, b"".join(map(_line, records)))
            except OSError:
                os.ftruncate(self._file, size)
                raise
        self.done.update(record["_index"] for record in records)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def is_joined(folder: Path) -> bool:
    """Return whether no process has rows of a run in files of its own any more."""
    return not any((folder / PARTS).glob("*/*.jsonl"))


def _indexed(path: Path, content: bytes) -> dict[int, bytes]:
    """Row -> its line, of the complete lines of a prediction file."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            index = json.loads(line)["_index"]
        except (ValueError, KeyError, TypeError):
            index = None
        if not isinstance(index, int):
            raise UserError(f"{path}, line {number}: not a prediction of this program; remove the file")
        if index in found:
            raise UserError(f"{path}, line {number}: row {index} is there twice; remove one of the lines")
        found[index] = line
    return found


def _line(record: dict) -> bytes:
    try:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold but UTF-8 may not
        line = json.dumps(record).encode("ascii")
    return line + b"\n"


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees the old content or the new one.

    Raises
    ------
    UserError
        If it cannot be written, as on a full disk; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            try:
                _write(file, content.encode("utf-8") if isinstance(content, str) else content)
            finally:
                os.close(file)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _write(descriptor: int, content: bytes) -> None:
    """Write all of it and return when it is on the disk."""
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); what was written before is whole. Put that right and give "
            "the same command again"
        ) from None
