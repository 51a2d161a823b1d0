"""Aggregation: the most common words of a numbered list, and of a coded text (RULER, section 3.3)."""

from __future__ import annotations

import math
import random
import string

from .drafts import Draft, Question, Seeds
from .words import pseudo_words

COMMON = 10  # words asked for
_CWE_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

FREQUENT = 3  # coded words asked for
_DOTS = "...."
_ZETA_2 = math.pi**2 / 6
_FWE_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def draft_common(seeds: Seeds, length: int) -> Draft:
    """Return the draft of a common-words row: a solved example, then the question. An item is a distinct word.

    From 4096 tokens on the ten common words appear 30 times and the others 3 times; below, 6 times and 3. The
    example has 40 words, 10 and 3 times; below 4096 tokens 20 words, 3 times and once.
    """
    often, rarely = (30, 3) if length >= 4096 else (6, 3)
    size, example_often, example_rarely = (40, 10, 3) if length >= 4096 else (20, 3, 1)
    pool = pseudo_words()
    words = seeds.rng("words").sample(pool, len(pool))
    example = _list_words(words[:size], example_often, example_rarely, seeds.rng("example order"))
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(example.answers, start=1))
    solved = f"{example.prompt}{example.prefix} {numbered}\n"
    words = words[size:]

    def build(count: int) -> Question:
        asked = _list_words(words[:count], often, rarely, seeds.rng("order"))
        return Question(solved + asked.prompt, asked.prefix, asked.answers)

    return Draft(build, least=COMMON + 1, most=len(words))


def _list_words(words: list[str], often: int, rarely: int, rng: random.Random) -> Question:
    listed = words[:COMMON] * often + words[COMMON:] * rarely
    rng.shuffle(listed)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
    return Question(_CWE_PROMPT.format(context=context), _CWE_PREFIX, words[:COMMON])


def draft_frequent(seeds: Seeds, length: int) -> Draft:
    """Return the draft of a frequent-words row. An item is a word of the text, before rounding.

    Of `length / 50` coded words of six letters the one of rank k makes up k^-2 / zeta(2) of the text; rank 1
    is noise, written as dots, and ranks 2 to 4 are asked for.
    """
    rng = seeds.rng("words")
    coded: dict[str, None] = {}
    while len(coded) < max(10, length // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = [_DOTS, *list(coded)[1:]]

    def build(count: int) -> Question:
        text = [
            word for rank, word in enumerate(ranked, start=1) for _ in range(int(count / (_ZETA_2 * rank**2)))
        ]
        seeds.rng("order").shuffle(text)
        answers = ranked[1 : 1 + FREQUENT]
        return Question(_FWE_PROMPT.format(context=" ".join(text)), _FWE_PREFIX, answers)

    return Draft(build, least=100)  # then ranks 2 to 5 differ: 15, 6, 3 and 2 times
