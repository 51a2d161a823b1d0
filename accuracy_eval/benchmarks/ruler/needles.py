"""Needle in a haystack, eight variants: single, multi-key, multi-value, multi-query (RULER, section 3.1)."""

from __future__ import annotations

import itertools
import random
import re

from .drafts import Draft, Question, Seeds
from .tasks import Task
from .words import KINDS, NOISE, different

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_PROMPT = (
    "{article} special magic {kind} {be} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What {ask} the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {be}"
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent


def draft(task: Task, seeds: Seeds, essays: list[str] | None) -> Draft:
    """Return the draft of one row.

    Parameters
    ----------
    task
        One of the `niah_` tasks.
    seeds
        The row's randomness.
    essays
        Words of the essay haystack. None: tasks that take essays get the noise sentence instead.

    Notes
    -----
    A haystack item is a word of the essays, a noise line, or a needle for another key.
    """
    options = task.options
    key_kind, value_kind = str(options["key"]), str(options["value"])
    values_each, queries = int(options.get("values", 1)), int(options.get("queries", 1))
    rng = seeds.rng("needles")
    keys = different(key_kind, int(options.get("keys", 1)), rng)
    drawn = iter(different(value_kind, len(keys) * values_each, rng))
    values = {key: [next(drawn) for _ in range(values_each)] for key in keys}
    needles = [_NEEDLE.format(kind=value_kind, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(keys, queries)
    answers = [value for key in asked for value in values[key]]

    haystack = options["haystack"]
    if haystack == "essay" and essays is None:
        haystack = "noise"
    others: list[str] = []
    other_rng = seeds.rng("other needles")

    def build(count: int) -> Question:
        place = seeds.rng("places")
        if haystack == "essay":
            context = _among_sentences(needles, essays, count, place)
        else:
            while haystack == "needle" and len(others) < count:
                key = KINDS[key_kind](other_rng)
                if key not in values:
                    others.append(
                        _NEEDLE.format(kind=value_kind, key=key, value=KINDS[value_kind](other_rng))
                    )
            lines = others[:count] if haystack == "needle" else [NOISE] * count
            for position, needle in zip(
                sorted(place.sample(range(count + 1), len(needles)), reverse=True), needles, strict=True
            ):
                lines.insert(position, needle)
            context = "\n".join(lines)
        return _ask(context, asked, answers, value_kind)

    return Draft(build, least=0 if haystack == "essay" else len(needles))


def _ask(context: str, asked: list[str], answers: list[str], kind: str) -> Question:
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = len(answers) == 1
    kind = kind[:-1] if one else kind
    words = {"kind": kind, "query": query, "be": "is" if one else "are"}
    prompt = _PROMPT.format(
        article="A" if one else "Some", ask="is" if one else "are all", context=context, **words
    )
    return Question(prompt, _PREFIX.format(**words), answers)


def _among_sentences(needles: list[str], essays: list[str], count: int, rng: random.Random) -> str:
    """Put needles between the sentences of the first `count` words, at some of 40 even depths."""
    text = " ".join(itertools.islice(itertools.cycle(essays), count))
    sentences = re.split(r"(?<=[.!?]) ", text) if text else []
    places = sorted(
        (len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles))), reverse=True
    )
    for place, needle in zip(places, needles, strict=True):
        sentences.insert(place, needle)
    return " ".join(sentences)
