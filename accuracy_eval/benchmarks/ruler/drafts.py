"""A row before its length is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes
    ----------
    prompt
        The task; a chat template goes around it.
    prefix
        How the answer begins; it follows the prompt, outside of a chat template (RULER, appendix D).
    answers
        The references.
    """

    prompt: str
    prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Draft:
    """A row that may have more or fewer haystack items.

    Attributes
    ----------
    build
        Number of items -> the question. The same number gives the same question.
    least, most
        Bounds of the number; `most` None: as many as fit.
    """

    build: Callable[[int], Question]
    least: int
    most: int | None = None


class Seeds:
    """Independent random generators of one row, by what they are for.

    The key is text, so that a row depends on (seed, task, length, index) only: not on the rows made before it,
    nor on the process (`random` hashes text with SHA-512).
    """

    def __init__(self, seed: int, task: str, length: int, index: int) -> None:
        self.key = f"{seed}/{task}/{length}/{index}"

    def rng(self, purpose: str) -> random.Random:
        """Return a fresh generator; the same purpose gives the same draws each time."""
        return random.Random(f"{self.key}/{purpose}")
