"""Question answering among distracting documents: SQuAD (qa_1) and HotpotQA (qa_2) (RULER, section 3.4).

Both data sets are read from local files in their publishers' format; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..shared.errors import UserError
from .drafts import Draft, Question, Seeds

#: Where the files are looked for unless --data_dir says otherwise.
DEFAULT_DIR = Path(__file__).resolve().parents[2] / "data" / "ruler"

_PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
    "documents. Only give me the answer and do not output any other words.\n\nQuestion: {question}"
)
_PREFIX = " Answer:"


@dataclass(frozen=True)
class Asked:
    """A question. `own` are the documents it is about; `near` those that come first as distractors."""

    question: str
    answers: list[str]
    own: list[int]
    near: list[int]


@dataclass(frozen=True)
class Corpus:
    """Questions and the documents of all of them, with the digest of the file they came from."""

    documents: list[str]
    questions: list[Asked]
    sha256: str


@dataclass(frozen=True)
class Source:
    """A data set that a task reads."""

    title: str
    files: tuple[str, ...]
    url: str
    parse: Callable[[object], tuple[list[str], list[Asked]]]


def _parse_squad(content: dict) -> tuple[list[str], list[Asked]]:
    articles = [[paragraph["context"] for paragraph in entry["paragraphs"]] for entry in content["data"]]
    documents = sorted({text for article in articles for text in article})
    place = {text: number for number, text in enumerate(documents)}
    asked = []
    for entry, article in zip(content["data"], articles, strict=True):
        of_article = list(dict.fromkeys(place[text] for text in article))
        for paragraph in entry["paragraphs"]:
            own = place[paragraph["context"]]
            near = [number for number in of_article if number != own]
            for question in paragraph["qas"]:
                if not question.get("is_impossible", False):
                    answers = [answer["text"] for answer in question["answers"]]
                    asked.append(Asked(question["question"], answers, [own], near))
    return documents, asked


def _parse_hotpotqa(content: list) -> tuple[list[str], list[Asked]]:
    texts = [[f"{title}\n{''.join(parts)}" for title, parts in entry["context"]] for entry in content]
    documents = sorted({text for of_entry in texts for text in of_entry})
    place = {text: number for number, text in enumerate(documents)}
    asked = [
        Asked(entry["question"], [entry["answer"]], list(dict.fromkeys(place[text] for text in of_entry)), [])
        for entry, of_entry in zip(content, texts, strict=True)
    ]
    return documents, asked


SOURCES = {
    "squad": Source(
        "SQuAD 2.0's development set",
        ("squad.json", "dev-v2.0.json"),
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
        _parse_squad,
    ),
    "hotpotqa": Source(
        "HotpotQA's distractor development set",
        ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
        "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
        _parse_hotpotqa,
    ),
}


def load_corpus(name: str, data_dir: Path | None) -> Corpus:
    """Read a data set.

    Parameters
    ----------
    name
        A key of `SOURCES`.
    data_dir
        The folder with its file; None: `accuracy_eval/data/ruler`.

    Raises
    ------
    UserError
        If the file is absent (the message says what to download and where to put it) or not in its format.
    """
    source, folder = SOURCES[name], data_dir or DEFAULT_DIR
    path = next((folder / file for file in source.files if (folder / file).is_file()), None)
    if path is None:
        raise UserError(
            f"no {' or '.join(source.files)} in {folder}: task {'qa_1' if name == 'squad' else 'qa_2'} asks "
            f"questions of {source.title}. Download\n  {source.url}\ninto that folder, or pass --data_dir "
            "FOLDER that holds it, or leave the task out (--tasks synthetic needs no file)"
        )
    content = path.read_bytes()
    try:
        documents, questions = source.parse(json.loads(content.decode("utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; download {source.url} anew") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not in the format of {source.title} ({type(error).__name__}: {error}); use {source.url}"
        ) from None
    if not questions:
        raise UserError(f"{path} holds no questions; use {source.url}")
    return Corpus(documents, questions, hashlib.sha256(content).hexdigest())


def draft(seeds: Seeds, index: int, corpus: Corpus) -> Draft:
    """Return the draft of one row: the corpus' question `index`. A haystack item is a document.

    The question's own documents come first, then those near them, then any; the order is shuffled.
    """
    asked = corpus.questions[index]
    rng = seeds.rng("documents")
    known = {*asked.own, *asked.near}
    near = rng.sample(asked.near, len(asked.near))
    others = [number for number in range(len(corpus.documents)) if number not in known]
    rng.shuffle(others)
    ranked = [*asked.own, *near, *others]

    def build(count: int) -> Question:
        numbers = ranked[:count]
        seeds.rng("order").shuffle(numbers)
        texts = [f"Document {i}:\n{corpus.documents[number]}" for i, number in enumerate(numbers, start=1)]
        prompt = _PROMPT.format(context="\n\n".join(texts), question=asked.question)
        return Question(prompt, _PREFIX, asked.answers)

    return Draft(build, least=len(asked.own), most=len(ranked))
