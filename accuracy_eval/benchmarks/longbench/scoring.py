"""Scores of prediction files, equal to the official scorer's to the last digit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..shared.scores import read_records
from .metrics import METRICS
from .tasks import Task

BUCKETS = ("0-4k", "4-8k", "8k+")


@dataclass
class Predictions:
    """The rows of one prediction file; `classes` are the last row's, which hold for the whole file."""

    answers: list[str] = field(default_factory=list)
    truths: list[list[str]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    classes: list[str] | None = None


def read_predictions(path: Path) -> Predictions:
    """Read a prediction file, ours or one the official code wrote.

    Raises
    ------
    UserError
        With the file and the line, if a line is not a prediction.
    """
    found = Predictions()
    for row in read_records(path, ("pred", "answers", "all_classes", "length")):
        found.answers.append(row["pred"])
        found.truths.append(row["answers"])
        found.lengths.append(row["length"])
        found.classes = row["all_classes"]
    return found


def row_scores(task: Task, predictions: Predictions) -> list[float]:
    """Return the score of each row: the best over its ground truths."""
    metric = METRICS[task.metric]
    scores = []
    for answer, truths in zip(predictions.answers, predictions.truths, strict=True):
        if task.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        scores.append(max((metric(answer, truth, predictions.classes) for truth in truths), default=0.0))
    return scores


def score(task: Task, predictions: Predictions) -> float:
    """Return the score of a data set in percent, to two digits."""
    total = 0.0
    for value in row_scores(task, predictions):  # added one by one: sum() is more exact since Python 3.12
        total += value
    return round(100 * total / len(predictions.answers), 2)


def score_by_length(task: Task, predictions: Predictions) -> dict[str, float | None]:
    """Return LongBench-E's scores: of rows below a length of 4000, below 8000, the rest; None: no rows."""
    import numpy as np

    buckets: dict[str, list[float]] = {name: [] for name in BUCKETS}
    for value, length in zip(row_scores(task, predictions), predictions.lengths, strict=True):
        buckets[BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]].append(value)
    # numpy's mean, because the official scorer's rounding is of that
    return {
        name: round(float(100 * np.mean(scores)), 2) if scores else None for name, scores in buckets.items()
    }
