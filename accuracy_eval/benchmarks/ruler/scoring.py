"""The benchmark's string match (RULER, section 4): how much of the references an answer contains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..shared.errors import UserError
from ..shared.scores import read_records
from .tasks import Task


def string_match_all(answer: str, references: list[str]) -> float:
    """Return the share of references that the answer contains, whatever their case, in [0, 1]."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: list[str]) -> float:
    """Return 1 if the answer contains any of the references, whatever their case, else 0."""
    return float(any(reference.lower() in answer.lower() for reference in references))


METRICS: dict[str, Callable[[str, list[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


def clean(answer: str) -> str:
    """Return the answer as the benchmark scores it: control characters become line feeds, ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def row_scores(task: Task, path: Path) -> list[float]:
    """Return the scores of a prediction file's rows, each in [0, 1].

    Raises
    ------
    UserError
        With the file and the line, if a line is not a prediction or has no references.
    """
    scores = []
    for number, row in enumerate(read_records(path, ("pred", "answers")), start=1):
        answers = row["answers"]
        if not answers or not all(isinstance(text, str) for text in (row["pred"], *answers)):
            raise UserError(f"{path}, line {number}: pred must be a string, answers some strings")
        scores.append(METRICS[task.metric](clean(row["pred"]), answers))
    return scores


def percent(scores: list[float]) -> float:
    """Return the mean in percent, to two digits."""
    return round(100 * sum(scores) / len(scores), 2)
