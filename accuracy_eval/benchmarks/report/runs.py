"""A run read back from its folder: what it was, a score for each row, and the bytes its cache held."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..longbench import scoring as longbench_scoring
from ..longbench import tasks as longbench_tasks
from ..ruler import scoring as ruler_scoring
from ..ruler import tasks as ruler_tasks
from ..shared.errors import UserError
from ..shared.scores import read_config, read_records, row_status
from ..shared.store import CONFIG

#: What may differ between the runs of one table; everything else of their configurations must be equal ...
VARIED = ("mode", "k_sparsity", "v_sparsity", "k_rule", "v_rule", "backend", "datasets", "environment")
#: ... and of these it must where both prune.
_OF_PRUNING = ("group_size", "residual_length")


@dataclass(frozen=True)
class Run:
    """A scored run.

    Attributes
    ----------
    label
        Its name in tables.
    folder
        Where it was read.
    config
        Its config.json.
    scores
        By data set: the rows' scores in [0, 1], in the order of the rows.
    kv_share
        Bytes that its cache held of those of a dense cache, over all rows; None if that was not measured.
    answers
        By data set: what was answered, in the order of the rows.
    """

    label: str
    folder: Path
    config: dict
    scores: dict[str, np.ndarray]
    kv_share: float | None
    answers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        return self.config["mode"] == "dense"


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read and score a run's folder.

    Raises
    ------
    UserError
        If it is no run, is scored by length (LongBench-E), is incomplete, or a line of it is malformed.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; long_test.sh and pred_ruler.py predict, and say into which")
    config = read_config(folder)
    if config is None or "datasets" not in config:
        raise UserError(f"{folder} is no run: it has no {CONFIG}; predict with long_test.sh or pred_ruler.py")
    if config.get("benchmark") == "longbench-e":
        raise UserError(f"{folder} is scored by length (--e); compare runs of plain LongBench")
    scores, answers, held, dense = {}, {}, 0, 0
    for name, entry in config["datasets"].items():
        path = folder / f"{name}.jsonl"
        records = read_records(path, ("pred", "answers")) if path.is_file() else []
        status, complete = row_status(len(records), entry)
        if not complete:
            raise UserError(f"{folder} is incomplete: {name} has {status}; the command of the run resumes it")
        order = np.argsort([record.get("_index", n) for n, record in enumerate(records)], kind="stable")
        scores[name] = np.array(_row_scores(config, name, entry, path))[order]
        answers[name] = [records[n]["pred"] for n in order]
        for record in records:
            mine, full = record.get("_kv_bytes", (0, 0))
            held, dense = held + mine, dense + full
    is_dense = config["mode"] == "dense"
    share = 1.0 if is_dense else held / dense if dense else None
    return Run(label or label_of(config), folder, config, scores, share, answers)


def _row_scores(config: dict, name: str, entry: dict, path: Path) -> list[float]:
    if config["benchmark"] == "ruler":
        found = ruler_tasks.parse_data_name(name)
        if found is None:
            raise UserError(f"{path}: not <task>_<length>.jsonl of RULER")
        return ruler_scoring.row_scores(found[0], path)
    known = longbench_tasks.longbench_tasks()
    task = known.get(name) or longbench_tasks.task_from_description(name, entry.get("task"), str(path))
    try:
        return longbench_scoring.row_scores(task, longbench_scoring.read_predictions(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be scored: {error}") from None


def label_of(config: dict) -> str:
    """A run in a few words: `dense`, or `K 0.7 V 0.7` with whatever is not the default."""
    if config["mode"] == "dense":
        return "dense"
    label = f"K {config['k_sparsity']:g} V {config['v_sparsity']:g}"
    if (config["k_rule"], config["v_rule"]) != ("Kt_Mag", "Vt_Mag"):
        label += f" {config['k_rule']}+{config['v_rule']}"
    if config["backend"] != "kernel":
        label += f" {config['backend']}"
    return label


def check_comparable(runs: list[Run]) -> list[str]:
    """Return the data sets that all runs have, in the first run's order.

    Raises
    ------
    UserError
        If two runs differ in more than how they prune (the message names the setting and both values), a run or
        a label is there twice, or no data set is common.
    """
    first = runs[0]
    for n, run in enumerate(runs):
        for other in runs[:n]:
            if run.folder.resolve() == other.folder.resolve():
                raise UserError(f"{run.folder} is given twice; name it once")
        _compare(first, run, [key for key in first.config if key not in (*VARIED, *_OF_PRUNING)])
        for other in runs[:n]:
            if run.label == other.label:
                raise UserError(
                    f"{other.folder}\nand {run.folder}\nare both {run.label!r}: the rows of a table must differ in "
                    "how they prune; leave one of them out"
                )
        pruned = [other for other in runs[:n] if not other.is_dense]
        if pruned and not run.is_dense:
            _compare(pruned[0], run, _OF_PRUNING)
    names = [name for name in first.scores if all(name in run.scores for run in runs)]
    if not names:
        raise UserError("the runs have no data set in common; compare runs of the same --datasets or --tasks")
    for run in runs[1:]:
        for name in names:
            there, here = first.config["datasets"][name], run.config["datasets"][name]
            for key in ("sha256", "task"):
                if there.get(key) != here.get(key):
                    _refuse(first, run, f"{name}.{key}", there.get(key), here.get(key))
            if len(first.scores[name]) != len(run.scores[name]):
                _refuse(first, run, f"{name}: rows", len(first.scores[name]), len(run.scores[name]))
    return names


def _compare(one: Run, other: Run, keys: list[str] | tuple[str, ...]) -> None:
    for key in keys:
        if one.config.get(key) != other.config.get(key):
            _refuse(one, other, key, one.config.get(key), other.config.get(key))


def _refuse(one: Run, other: Run, what: str, first: object, second: object) -> None:
    raise UserError(
        f"rows of different configurations do not make one table: {what} is {first!r} in\n  {one.folder}\n"
        f"and {second!r} in\n  {other.folder}\n"
        "Predict one of them anew with the other's options, or report them separately"
    )
