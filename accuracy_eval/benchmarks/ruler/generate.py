"""Rows of a task at a length, measured with the model's own tokenizer.

A row is made of as many haystack items as fit, so that prompt and answer budget together come close to the
length and are never above it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..shared.chat import with_chat_template
from ..shared.errors import UserError
from . import counts, documents, needles, variables
from .drafts import Draft, Question, Seeds
from .tasks import Task, data_name

#: Raised when a change makes other rows of the same seed, so that a run is not resumed with a mixture.
VERSION = 1


@dataclass(frozen=True)
class Essays:
    """The words of a local text, with the file's digest."""

    words: list[str]
    sha256: str


@dataclass
class Sources:
    """What rows are made of beside the seed."""

    essays: Essays | None = None
    corpora: dict[str, documents.Corpus] = field(default_factory=dict)

    def digest(self, task: Task) -> str | None:
        """Return the SHA-256 of the file that the task's rows come from, None where there is none."""
        if task.source:
            return self.corpora[task.source].sha256
        return self.essays.sha256 if self.essays and task.takes_essays else None


FAMILIES: dict[str, Callable[[Task, Seeds, int, int, Sources], Draft]] = {
    "niah": lambda task, seeds, length, index, sources: needles.draft(
        task, seeds, sources.essays.words if sources.essays else None
    ),
    "vt": lambda task, seeds, length, index, sources: variables.draft(seeds),
    "cwe": lambda task, seeds, length, index, sources: counts.draft_common(seeds, length),
    "fwe": lambda task, seeds, length, index, sources: counts.draft_frequent(seeds, length),
    "qa": lambda task, seeds, length, index, sources: documents.draft(
        seeds, index, sources.corpora[task.source]
    ),
}


def load_essays(path: Path) -> Essays:
    """Read the essay haystack: a text, or JSON with the text under "text".

    Raises
    ------
    UserError
        If the file is absent, unreadable or empty.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["text"]
        words = text.split()
    except OSError as error:
        raise UserError(
            f"--essays {path}: {error.strerror}; give a text file (RULER's haystack is Paul Graham's essays), or "
            "leave --essays out, which makes some tasks easier"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'--essays {path}: neither UTF-8 text nor JSON of the form {{"text": "..."}} '
            f"({type(error).__name__}: {error})"
        ) from None
    if not words:
        raise UserError(f"--essays {path} is empty; give a text file")
    return Essays(words, hashlib.sha256(content).hexdigest())


def encode(question: Question, tokenizer, template: str) -> list[int]:
    """Return a question's token ids: prompt, chat template around it, then how the answer begins.

    The tokenizer's own chat template writes the special tokens itself; otherwise the tokenizer adds them.
    """
    text = with_chat_template(question.prompt, template, tokenizer) + question.prefix
    return tokenizer(text, add_special_tokens=template != "model", truncation=False, verbose=False)[
        "input_ids"
    ]


def make_row(
    task: Task, length: int, index: int, *, seed: int, tokenizer, template: str, sources: Sources
) -> dict:
    """Make one row; it depends on nothing but the arguments.

    Returns
    -------
    dict
        `ids` (token ids of the prompt), `outputs` (the references) and `length` (tokens of prompt and answer
        budget together, at most the length asked for).

    Raises
    ------
    UserError
        If the row does not fit with the fewest items it can have.
    """
    draft = FAMILIES[task.family](task, Seeds(seed, task.name, length, index), length, index, sources)
    made: dict[int, tuple[list[int], list[str]]] = {}

    def size(count: int) -> int:
        question = draft.build(count)
        made[count] = encode(question, tokenizer, template), question.answers
        return len(made[count][0]) + task.max_new_tokens

    fewest = size(draft.least)
    if fewest > length:
        raise UserError(
            f"{data_name(task, length)}, row {index}: needs {fewest} tokens at least, prompt and answer "
            f"together; choose a longer length, or leave the task out"
        )
    ids, answers = made[largest(size, length, draft.least, fewest, draft.most)]
    return {"ids": ids, "outputs": answers, "length": len(ids) + task.max_new_tokens}


def largest(size: Callable[[int], int], limit: int, least: int, fewest: int, most: int | None) -> int:
    """Return the largest count whose size is within the limit.

    The bounds are bisected, by interpolation where that is faster: a size costs a tokenization, and grows almost
    evenly with the count. What is returned has been measured.

    Parameters
    ----------
    size
        Count -> size, not falling.
    limit
        The largest size allowed.
    least, fewest
        The smallest count and its size, which is within the limit.
    most
        The largest count, None if there is none.
    """
    low, low_size, step = least, fewest, 8
    while True:  # find a count that is too large
        high = low + step if most is None else min(low + step, most)
        if high == low:
            return low
        high_size = size(high)
        if high_size > limit:
            break
        grown = high_size - low_size
        ahead = (limit - high_size) * (high - low) // grown if grown > 0 else 2 * step
        low, low_size, step = high, high_size, ahead + ahead // 64 + 1
    halve = False
    while high - low > 1:
        if halve or high_size <= low_size:
            middle = (low + high) // 2
        else:
            middle = low + (limit - low_size) * (high - low) // (high_size - low_size)
        middle = min(max(middle, low + 1), high - 1)
        width, middle_size = high - low, size(middle)
        if middle_size <= limit:
            low, low_size = middle, middle_size
        else:
            high, high_size = middle, middle_size
        halve = not halve and 2 * (high - low) > width and high - low > 4
    return low
