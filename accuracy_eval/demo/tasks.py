"""The demo's tasks: seeded, vectorised generators of contexts, questions and answers.

A context is a sequence of sentences of eight words: facts of one fixed grammar among filler. Each question asks
for one fact. An answer opens with a word that says nothing ("the", "Paragraph") or that prefill finds, so that
what was asked for is read while decoding, that is, from the pruned cache: the first token of any answer comes out
of prefill's dense attention, and an answer of one word would never touch the pruned cache.

In a fact the answer comes before what it is asked by ("The mill is where Zanda lives now."): the name's own
position can then gather the answer in one layer and be found by its name in the next. README.md has what was
tried.

Everything is made as tensors of word ids, on any device: training makes its batches on the GPU, inside the
captured step, and the bundled rows come from the same functions with a seeded generator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from demo import words as w
from demo.words import BOS, EOS, PAD, UNK, to_words

SENTENCE = 8  # words
MAX_TOKENS = 4096  # of prompt and answer
MAX_PARAGRAPHS = 99
MOST_NAMES = 128  # different first names of a context with full names, and as many family names
SHARED = 8  # facts that share a first name, and a family name

# person, family name, boss and its family name, place, object, noun, labels, deed, number
PLACEHOLDERS = ("P", "F", "B", "G", "V", "O", "N", "L", "L1", "L2", "L3", "D", "#")
FILLER = "The fs fv near the fo again ."


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task looks like; capital letters stand for what `draw` fills in.

    Attributes
    ----------
    head, fact, question, answer : str
        Words: before the context, of a fact, of a question, of its answer.
    prompt : str
        LongBench's kind of template, with {context} and {input}; the same words as head and question.
    metric : str
        Name of the LongBench metric.
    draw : callable
        ``draw(rng, rows, facts, asked, most)`` with the number of facts of each row, [rows, 1], at most `most`
        -> ids of facts [rows, most, 8], questions [rows, asked, q] and answers [rows, asked, a].
    """

    head: str
    fact: str
    question: str
    answer: str
    prompt: str
    metric: str
    draw: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    max_new_tokens: int = 8
    least_facts: int = 2
    most_facts: int = 10**6


def _vocabulary() -> list[str]:
    """Every word that a row or a prompt can hold, sorted; the special tokens come before."""
    groups = [w.PERSONS, w.PLACE_NOUNS, w.OBJECTS, w.DEEDS, w.LABELS, *w.CATEGORY_WORDS.values()]
    groups += [w.FILLER_SUBJECTS, w.FILLER_VERBS, w.FILLER_SPOTS, map(str, range(1, MAX_PARAGRAPHS + 1))]
    found = {word for group in groups for word in group}
    for task in TASKS.values():
        for text in (task.head, task.fact, task.question, task.answer, EMPLOYER_FACT, MANAGER_FACT, FILLER):
            found.update(word for word in text.split() if word not in (*PLACEHOLDERS, "fs", "fv", "fo"))
    return [PAD, BOS, EOS, UNK, *sorted(found - {EOS})]


class Rng:
    """Random draws on a device: torch's own state (which a CUDA graph advances) or a seeded generator's.

    `hints` is the share of few-shot questions about nouns that examples may show. Training asks some: that a noun
    can be looked up is found out first, that its whole kind can be follows.

    `ease` is how much easier than asked for the keys of several words may be, 0 to 1: a row draws how many facts
    share a word between `SHARED` and, at 1, one. Where no fact shares a word, any word of the key finds the fact;
    that is found out first, too.
    """

    def __init__(
        self, device: str = "cpu", seed: int | None = None, hints: float = 0.0, ease: float = 0.0
    ) -> None:
        self.device, self.hints, self.ease = device, hints, ease
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.ids = {word: i for i, word in enumerate(VOCABULARY)}
        self.tables: dict[str, torch.Tensor] = {}

    def table(self, name: str, words: list[str]) -> torch.Tensor:
        """Ids of a list of words, kept on the device."""
        if name not in self.tables:
            self.tables[name] = torch.tensor([self.ids[word] for word in words], device=self.device)
        return self.tables[name]

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator)

    def below(self, limit: int | torch.Tensor, *shape: int) -> torch.Tensor:
        """Integers in [0, limit)."""
        return (self.uniform(*shape) * limit).long()

    def different(self, limit: int, rows: int, count: int) -> torch.Tensor:
        """[rows, count] integers in [0, limit), different within a row."""
        return self.uniform(rows, limit).argsort(1)[:, :count]

    def pick(self, name: str, words: list[str], *shape: int) -> torch.Tensor:
        return self.table(name, words)[self.below(len(words), *shape)]

    def fill(self, template: str, shape: tuple[int, ...], **slots: torch.Tensor) -> torch.Tensor:
        """Ids [*shape, words of the template], with the ids of `slots` in place of their names."""
        parts = template.split()
        key = f"template/{template}"
        if key not in self.tables:
            fixed = [self.ids.get(part, 0) if part not in slots else 0 for part in parts]
            self.tables[key] = torch.tensor(fixed, device=self.device)
        out = self.tables[key].expand(*shape, len(parts)).clone()
        for i, part in enumerate(parts):
            if part in slots:
                out[..., i] = slots[part]
        return out


def _asked(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int) -> torch.Tensor:
    """[rows, asked] indices of the facts asked for, below `facts` [rows, 1], as different as they can be."""
    order = (
        rng.uniform(rows, most).masked_fill(torch.arange(most, device=rng.device) >= facts, 2.0).argsort(1)
    )
    turn = torch.arange(asked, device=rng.device)[None] % facts
    return order.gather(1, turn)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index)


def _cells(
    rng: Rng, rows: int, side: torch.Tensor, largest: int, dims: int, count: int
) -> list[torch.Tensor]:
    """`count` different cells of a cube of `dims` dimensions: its coordinates, `dims` times [rows, count].

    `side` [rows, 1] is each row's length of the cube, at most `largest`; cells beyond side ** dims repeat none of
    the first ones, and may lie outside.
    """
    cell = torch.arange(largest**dims, device=rng.device)
    coordinates = [cell // largest**i % largest for i in reversed(range(dims))]
    outside = torch.stack(coordinates).amax(0)[None] >= side
    order = rng.uniform(rows, largest**dims).masked_fill(outside, 2.0).argsort(1)[:, :count]
    return [order // largest**i % largest for i in reversed(range(dims))]


def _shared(rng: Rng, rows: int) -> torch.Tensor:
    """How many facts share a word of a key, [rows, 1]."""
    return SHARED - (SHARED - 1) * rng.ease * rng.uniform(rows, 1)


def _full_names(rng: Rng, rows: int, facts: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and family names of different persons, each [rows, most]; `SHARED` of `facts` persons share one."""
    largest = min(MOST_NAMES, most)
    side = torch.maximum((facts / _shared(rng, rows)).ceil(), facts.sqrt().ceil()).long().clamp(max=largest)
    first, family = _cells(rng, rows, side, largest, 2, most)
    names = rng.table("persons", w.PERSONS)[rng.different(len(w.PERSONS), rows, 2 * largest)]
    return _at(names[:, :largest], first), _at(names[:, largest:], family)


def homes(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Single facts: who lives where."""
    task = TASKS["homes"]
    person = rng.table("persons", w.PERSONS)[rng.different(len(w.PERSONS), rows, most)]
    place = rng.pick("places", w.PLACE_NOUNS, rows, most)
    i = _asked(rng, rows, facts, asked, most)
    return (
        rng.fill(task.fact, (rows, most), P=person, V=place),
        rng.fill(task.question, (rows, asked), P=_at(person, i)),
        rng.fill(task.answer, (rows, asked), V=_at(place, i)),
    )


def stores(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Keys of two words: persons keep several objects, and others keep the same ones."""
    task = TASKS["stores"]
    per_person = 3
    persons = -(-most // per_person)
    person = rng.different(len(w.PERSONS), rows, persons).repeat_interleave(per_person, 1)[:, :most]
    objects = len(w.OBJECTS)
    # Three different objects a person: a random start, then steps that cannot meet.
    start = rng.below(objects, rows, persons).repeat_interleave(per_person, 1)[:, :most]
    step = torch.arange(most, device=rng.device) % per_person * (objects // per_person)
    jitter = rng.below(objects // per_person, rows, most)
    thing = (start + step + jitter) % objects
    person = rng.table("persons", w.PERSONS)[person]
    thing = rng.table("objects", w.OBJECTS)[thing]
    place = rng.pick("places", w.PLACE_NOUNS, rows, most)
    i = _asked(rng, rows, facts, asked, most)
    return (
        rng.fill(task.fact, (rows, most), P=person, O=thing, V=place),
        rng.fill(task.question, (rows, asked), P=_at(person, i), O=_at(thing, i)),
        rng.fill(task.answer, (rows, asked), V=_at(place, i)),
    )


def employers(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Two hops: who employs a person, and where that one lives. Even facts are homes, odd ones employers."""
    task = TASKS["employers"]
    pairs = (facts // 2).clamp(min=1)  # [rows, 1]
    half = -(-most // 2)
    person = rng.table("persons", w.PERSONS)[rng.different(len(w.PERSONS), rows, half)]
    place = rng.pick("places", w.PLACE_NOUNS, rows, half)
    shift = 1 + rng.below((pairs - 1).clamp(min=1), rows, 1)
    boss_of = (torch.arange(half, device=rng.device)[None] + shift) % pairs
    boss = _at(person, boss_of)
    home = rng.fill(TASKS["homes"].fact, (rows, half), P=person, V=place)
    work = rng.fill(EMPLOYER_FACT, (rows, half), P=person, B=boss)
    i = _asked(rng, rows, pairs, asked, half)
    return (
        torch.stack([home, work], 2).flatten(1, 2)[:, :most],
        rng.fill(task.question, (rows, asked), P=_at(person, i)),
        rng.fill(task.answer, (rows, asked), B=_at(boss, i), V=_at(_at(place, boss_of), i)),
    )


EMPLOYER_FACT = "B hired P in the early spring ."


def residents(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Keys of two words: full names, whose first and family names other persons have too."""
    task = TASKS["residents"]
    first, family = _full_names(rng, rows, facts, most)
    place = rng.pick("places", w.PLACE_NOUNS, rows, most)
    i = _asked(rng, rows, facts, asked, most)
    key = {"P": _at(first, i), "F": _at(family, i)}
    return (
        rng.fill(task.fact, (rows, most), P=first, F=family, V=place),
        rng.fill(task.question, (rows, asked), **key),
        rng.fill(task.answer, (rows, asked), V=_at(place, i), **key),
    )


def managers(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Two hops over full names: who employs a person, and where that one lives."""
    task = TASKS["managers"]
    pairs = (facts // 2).clamp(min=1)
    half = -(-most // 2)
    first, family = _full_names(rng, rows, pairs, half)
    place = rng.pick("places", w.PLACE_NOUNS, rows, half)
    shift = 1 + rng.below((pairs - 1).clamp(min=1), rows, 1)
    boss_of = (torch.arange(half, device=rng.device)[None] + shift) % pairs
    boss = {"B": _at(first, boss_of), "G": _at(family, boss_of)}
    home = rng.fill(TASKS["residents"].fact, (rows, half), P=first, F=family, V=place)
    work = rng.fill(MANAGER_FACT, (rows, half), P=first, F=family, **boss)
    i = _asked(rng, rows, pairs, asked, half)
    key = {"P": _at(first, i), "F": _at(family, i)}
    asked_boss = {name: _at(value, i) for name, value in boss.items()}
    return (
        torch.stack([home, work], 2).flatten(1, 2)[:, :most],
        rng.fill(task.question, (rows, asked), **key),
        rng.fill(task.answer, (rows, asked), V=_at(_at(place, boss_of), i), **key, **asked_boss),
    )


MANAGER_FACT = "The ledger has P F B G ."


def groups(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Several values: each person's group has a name of three words, and the answer is all of it."""
    task = TASKS["groups"]
    person = rng.table("persons", w.PERSONS)[rng.different(len(w.PERSONS), rows, most)]
    name = {f"L{n}": rng.pick("labels", w.LABELS, rows, most) for n in (1, 2, 3)}
    i = _asked(rng, rows, facts, asked, most)
    key = {"P": _at(person, i)}
    return (
        rng.fill(task.fact, (rows, most), P=person, **name),
        rng.fill(task.question, (rows, asked), **key),
        rng.fill(task.answer, (rows, asked), **key, **{n: _at(value, i) for n, value in name.items()}),
    )


def topics(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int, name: str = "topics"):
    """Few-shot classification: every context makes up a label for each kind of noun; the noun is unseen."""
    task = TASKS[name]
    nouns = rng.table("nouns", [word for words in w.CATEGORY_WORDS.values() for word in words])
    nouns = nouns.view(len(w.CATEGORY_WORDS), -1)  # [kinds, 12]
    shown = 8  # of each kind; the others are asked for
    kinds = (2 + rng.below(len(w.CATEGORY_WORDS) - 1, rows, 1)).minimum(facts)
    kind_of = rng.different(len(w.CATEGORY_WORDS), rows, len(w.CATEGORY_WORDS))
    label_of = rng.table("labels", w.LABELS)[rng.different(len(w.LABELS), rows, len(w.CATEGORY_WORDS))]
    turn = torch.arange(most, device=rng.device)[None] % kinds
    kind = _at(kind_of, turn)
    noun = nouns[kind, rng.below(shown, rows, most)]
    i = rng.below(kinds, rows, asked)
    hint = rng.uniform(rows, asked) < rng.hints
    new = torch.where(
        hint, rng.below(shown, rows, asked), shown + rng.below(nouns.shape[1] - shown, rows, asked)
    )
    new = nouns[_at(kind_of, i), new]
    return (
        rng.fill(task.fact, (rows, most), N=noun, L=_at(label_of, turn)),
        rng.fill(task.question, (rows, asked), N=new),
        rng.fill(task.answer, (rows, asked), L=_at(label_of, i), N=new),
    )


def paragraphs(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Passage retrieval: which numbered paragraph an abstract is from. Facts stay in order, so numbers ascend."""
    task = TASKS["paragraphs"]
    person = rng.table("persons", w.PERSONS)[rng.different(len(w.PERSONS), rows, most)]
    deed = rng.pick("deeds", w.DEEDS, rows, most)
    thing = rng.pick("objects", w.OBJECTS, rows, most)
    number = rng.table("numbers", [str(n) for n in range(1, MAX_PARAGRAPHS + 1)])[:most].expand(rows, most)
    i = _asked(rng, rows, facts, asked, most)
    return (
        rng.fill(task.fact, (rows, most), P=person, D=deed, O=thing, **{"#": number}),
        rng.fill(task.question, (rows, asked), P=_at(person, i), D=_at(deed, i), O=_at(thing, i)),
        rng.fill(task.answer, (rows, asked), **{"#": _at(number, i)}),
    )


def abstracts(rng: Rng, rows: int, facts: torch.Tensor, asked: int, most: int):
    """Passage retrieval by three words, each of which, and any two of which, other paragraphs have too."""
    task = TASKS["abstracts"]
    largest = len(w.DEEDS)
    least = facts.pow(1 / 3).ceil() + 1
    side = (
        (least + (largest - least).clamp(min=0) * rng.ease * rng.uniform(rows, 1)).long().clamp(max=largest)
    )
    cell = _cells(rng, rows, side, largest, 3, most)
    person, deed, thing = (
        _at(rng.table(name, words)[rng.different(len(words), rows, largest)], index)
        for (name, words), index in zip(
            (("persons", w.PERSONS), ("deeds", w.DEEDS), ("objects", w.OBJECTS)), cell, strict=True
        )
    )
    number = rng.table("numbers", [str(n) for n in range(1, MAX_PARAGRAPHS + 1)])
    number = number[rng.different(MAX_PARAGRAPHS, rows, most)]
    i = _asked(rng, rows, facts, asked, most)
    key = {"P": _at(person, i), "D": _at(deed, i), "O": _at(thing, i)}
    return (
        rng.fill(task.fact, (rows, most), P=person, D=deed, O=thing, **{"#": number}),
        rng.fill(task.question, (rows, asked), **key),
        rng.fill(task.answer, (rows, asked), **key, **{"#": _at(number, i)}),
    )


def _qa(
    head: str, fact: str, question: str, answer: str, draw: Callable, metric: str = "qa_f1", **more: int
) -> Task:
    prompt = head.replace(" .", ".") + "\n\n{context}\n\nQuestion: {input}\nAnswer:"
    return Task(head, fact, f"Question : {question} ? Answer :", answer, prompt, metric, draw, **more)


TASKS: dict[str, Task] = {
    "homes": _qa(
        "Read the notes and answer the question .", "The V is where P lives now .",
        "Where does P live", "the V </s>", homes,
    ),
    "stores": _qa(
        "Read the ledger and answer the question .", "The V holds the O of P .",
        "Where does P keep the O", "the V </s>", stores,
    ),
    "employers": _qa(
        "Read the letters and answer the question .", "The V is where P lives now .",
        "Who employs P and where", "B in the V </s>", employers, least_facts=4,
    ),
    "topics": dataclasses.replace(
        _qa(
            "Read the examples and answer the question .", "The L group holds the N too .",
            "What group has the N", "the L group </s>", topics,
        ),
        metric="classification",
    ),
    "paragraphs": Task(
        "Find the paragraph of the abstract below .", "Paragraph # : P D the O .",
        "Abstract : P D the O . Answer :", "Paragraph # </s>",
        "Find the paragraph of the abstract below.\n\n{context}\n\nAbstract: {input}\nAnswer:",
        "retrieval", paragraphs, most_facts=MAX_PARAGRAPHS,
    ),
    "residents": _qa(
        "Read the ledger and answer the question .", "The ledger now has P F V .",
        "Where does P F live", "P F V </s>", residents, "exact_match",
    ),
    "managers": _qa(
        "Read the ledger and answer the question .", "The ledger now has P F V .",
        "Who employs P F and where", "P F B G V </s>", managers, "exact_match", least_facts=4,
    ),
    "groups": _qa(
        "Read the notes and answer the question .", "The group holds P L1 L2 L3 .",
        "What group has P", "P L1 L2 L3 </s>", groups, "exact_match",
    ),
    "kinds": _qa(
        "Read the examples and answer the question .", "The group now has the N L .",
        "What group has the N", "N L </s>", functools.partial(topics, name="kinds"), "exact_match",
    ),
    "abstracts": Task(
        "Find the paragraph of the abstract below .", "Abstract : P D the O # .",
        "Abstract : P D the O . Answer :", "P D the O # </s>",
        "Find the paragraph of the abstract below.\n\n{context}\n\nAbstract: {input}\nAnswer:",
        "exact_match", abstracts, most_facts=MAX_PARAGRAPHS,
    ),
}  # fmt: skip

VOCABULARY = _vocabulary()


def filler(rng: Rng, *shape: int) -> torch.Tensor:
    """Sentences that carry no fact: ids [*shape, 8]."""
    return rng.fill(
        FILLER,
        shape,
        fs=rng.pick("subjects", w.FILLER_SUBJECTS, *shape),
        fv=rng.pick("verbs", w.FILLER_VERBS, *shape),
        fo=rng.pick("spots", w.FILLER_SPOTS, *shape),
    )


def make(
    rng: Rng, name: str, rows: int, sentences: int, asked: int, density: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts of a task and what is asked about them.

    Parameters
    ----------
    density : (low, high)
        Each row draws the share of its sentences that are facts from this range; at least `least_facts` are.

    Returns
    -------
    context : int64 [rows, sentences, 8]
    questions : int64 [rows, asked, q]
    answers : int64 [rows, asked, a], the last word is EOS
    """
    task = TASKS[name]
    most = min(sentences, task.most_facts, len(w.PERSONS) - 8)
    share = density[0] + (density[1] - density[0]) * rng.uniform(rows, 1)
    facts = (share * sentences).long().clamp(min(task.least_facts, most), most)
    told, questions, answers = task.draw(rng, rows, facts, asked, most)
    # Which sentence is which fact: a random choice of places, and a random order but for numbered paragraphs.
    place = rng.uniform(rows, sentences).argsort(1)  # facts take the first `facts` of these places
    if name == "paragraphs":
        is_fact = torch.arange(sentences, device=rng.device)[None] < facts
        place = place.masked_fill(~is_fact, sentences).sort(1).values  # facts in order of place
        rest = place.new_zeros(rows, sentences + 1).scatter(1, place, 1)[:, :sentences]
        rank = rest.cumsum(1) - 1
        fact = _sentences(told, rank.clamp(0, most - 1))
        return torch.where(rest[..., None] > 0, fact, filler(rng, rows, sentences)), questions, answers
    index = torch.empty_like(place).scatter_(
        1, place, torch.arange(sentences, device=rng.device).expand_as(place)
    )
    fact = _sentences(told, index.clamp(max=most - 1))
    return torch.where((index < facts)[..., None], fact, filler(rng, rows, sentences)), questions, answers


def _sentences(told: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """told [rows, facts, 8] at index [rows, n] -> [rows, n, 8]."""
    return told.gather(1, index[..., None].expand(*index.shape, SENTENCE))


def head_ids(rng: Rng, name: str) -> torch.Tensor:
    """BOS and the words before the context."""
    return rng.table(f"head/{name}", [BOS, *to_words(TASKS[name].head)])
