"""Variable tracking: a chain of assignments scattered among noise (RULER, section 3.2)."""

from __future__ import annotations

import itertools
import random
import string

from .drafts import Draft, Question, Seeds
from .words import NOISE

HOPS = 4
_EXAMPLE_NOISE = 10  # lines
_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are: "
)


def draft(seeds: Seeds) -> Draft:
    """Return the draft of one row: a solved example with names of three letters, then the question with five.

    A haystack item is a noise line.
    """
    rng = seeds.rng("chains")
    example = _ask(*_chain(rng, 3), _EXAMPLE_NOISE, seeds.rng("example places"))
    solved = f"{example.prompt}{example.prefix}{' '.join(example.answers)}\n\n"
    names, value = _chain(rng, 5)

    def build(count: int) -> Question:
        asked = _ask(names, value, count, seeds.rng("places"))
        return Question(solved + asked.prompt, asked.prefix, asked.answers)

    return Draft(build, least=HOPS + 1)


def _chain(rng: random.Random, letters: int) -> tuple[list[str], int]:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names), rng.randint(10000, 99999)


def _ask(names: list[str], value: int, noise: int, rng: random.Random) -> Question:
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    lines = [NOISE] * noise
    for shift, position in enumerate(sorted(rng.sample(range(noise + 1), len(chain)))):
        lines.insert(position + shift, chain[shift])
    prefix = _PREFIX.format(count=len(names), value=value)
    return Question(_PROMPT.format(context="\n".join(lines), value=value), prefix, names)
