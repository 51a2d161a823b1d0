"""What keys and values are made of: pseudo-words, numbers, UUIDs. All of it comes from a seeded generator.

RULER draws words from a package's lists of English words. Here they are made: five letters, consonant, vowel,
consonant, vowel, consonant. They are all of one length, so that none is part of another and a match is a match.
"""

from __future__ import annotations

import functools
import random
import uuid
from collections.abc import Callable

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_FIRST, _MIDDLE, _LAST, _VOWELS = "bdfghjklmnprstvwz", "bdfgklmnprstvz", "dgklmnprstx", "aeiou"


@functools.cache
def pseudo_words() -> tuple[str, ...]:
    """Return all 65,450 words, in a fixed order."""
    return tuple(
        a + b + c + d + e for a in _FIRST for b in _VOWELS for c in _MIDDLE for d in _VOWELS for e in _LAST
    )


def _compound(rng: random.Random) -> str:
    return f"{rng.choice(pseudo_words())}-{rng.choice(pseudo_words())}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


#: Kind of a key or value, in the plural as the prompts have it -> a random one.
KINDS: dict[str, Callable[[random.Random], str]] = {"words": _compound, "numbers": _number, "uuids": _uuid}


def different(kind: str, count: int, rng: random.Random) -> list[str]:
    """Return `count` keys or values of a kind, no two equal."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[KINDS[kind](rng)] = None
    return list(found)
