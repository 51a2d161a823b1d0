"""LongBench's metrics. Each takes a prediction, one ground truth and the file's classes, and returns 0 ... 1.

They follow the official scorer to the last digit, its oddities included; a comment marks each oddity.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str] | None], float]

METRICS: dict[str, Metric] = {}

_ASCII_PUNCTUATION = frozenset(string.punctuation)
_CHINESE_PUNCTUATION = frozenset(
    # ruff: noqa: RUF001 - the characters that look like ASCII are the point
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def _metric(name: str) -> Callable[[Metric], Metric]:
    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register


@functools.cache
def _jieba():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its string escapes are deprecated, and pkg_resources is
        import jieba
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr
    return jieba


def _words_zh(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


def _without(text: str, characters: frozenset[str]) -> str:
    return "".join(character for character in text if character not in characters)


def normalize_answer(text: str) -> str:
    """Lower-case, then drop ASCII punctuation, English articles and extra white space."""
    text = _without(text.lower(), _ASCII_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize_answer_zh(text: str) -> str:
    """Lower-case, then drop ASCII and Chinese punctuation and all white space."""
    return "".join(_without(text.lower(), _ASCII_PUNCTUATION | _CHINESE_PUNCTUATION).split())


def _f1(predicted: list[str], truth: list[str]) -> float:
    common = (Counter(predicted) & Counter(truth)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(truth)
    return 2 * precision * recall / (precision + recall)


@_metric("qa_f1")
def qa_f1_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """F1 over the words of the normalized answers."""
    return _f1(normalize_answer(prediction).split(), normalize_answer(truth).split())


@_metric("qa_f1_zh")
def qa_f1_zh_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """F1 over jieba's words; words that normalize to nothing do not count."""
    words = ([normalize_answer_zh(word) for word in _words_zh(text)] for text in (prediction, truth))
    return _f1(*([word for word in answer if word] for answer in words))


def _calls_left() -> int:
    """Return how many nested calls the recursion limit still allows."""
    try:
        return 1 + _calls_left()
    except RecursionError:
        return 0


def _rouge_l(prediction: str, truth: str, official_depth: int) -> float:
    from rouge import Rouge

    # The package rebuilds a common subsequence by recursion, and the official scorer counts the
    # RecursionError of a very long pair as 0. Which pairs those are depends on how deep the caller's stack
    # is: allow what the default limit of 1000 leaves to the official scorer, `official_depth` frames up.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + (999 - official_depth) - _calls_left())
    try:
        return Rouge().get_scores([prediction], [truth], avg=True)["rouge-l"]["f"]
    except Exception:  # as officially: most often 'Hypothesis is empty.'
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


@_metric("rouge")
def rouge_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """ROUGE-L F of the `rouge` package (summary level: a full stop ends a sentence); a failure scores 0."""
    return _rouge_l(prediction, truth, official_depth=3)


@_metric("rouge_zh")
def rouge_zh_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """ROUGE-L F over jieba's words."""
    return _rouge_l(" ".join(_words_zh(prediction)), " ".join(_words_zh(truth)), official_depth=4)


@_metric("classification")
def classification_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Return 1 / (classes the prediction names) if the right one is among them, else 0.

    A class whose name is part of the right one's does not count.

    Raises
    ------
    ValueError
        If the file has no classes.
    """
    if not classes:
        raise ValueError("classification needs all_classes, a list of class names, in the data's rows")
    named = [name for name in classes if name in prediction]
    # Officially the list is shortened while it is walked, so the name after a dropped one is never looked at.
    position = 0
    while position < len(named):
        if named[position] in truth and named[position] != truth:
            named.remove(named[position])
        position += 1
    return 1.0 / len(named) if truth in named else 0.0


def _share_of_numbers(prediction: str, expected: str) -> float:
    # Compared as strings: "07" is not "7".
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(expected) / len(numbers) if numbers else 0.0


def _paragraph_number(pattern: str, truth: str) -> str:
    found = re.search(pattern, truth)
    if found is None:
        raise ValueError(f"a ground truth of passage retrieval must look like {pattern!r}, got {truth!r}")
    return found.group(1)


@_metric("count")
def count_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, str(truth))


@_metric("retrieval")
def retrieval_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Share of the numbers in the prediction that are the paragraph's."""
    return _share_of_numbers(prediction, _paragraph_number(r"Paragraph (\d+)", truth))


@_metric("retrieval_zh")
def retrieval_zh_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Share of the numbers in the prediction that are the Chinese paragraph's."""
    return _share_of_numbers(prediction, _paragraph_number(r"段落(\d+)", truth))


def fuzzy_ratio(first: str, second: str) -> int:
    """Return `fuzzywuzzy.fuzz.ratio` as it is without python-Levenshtein, which rates some pairs differently.

    Written out because fuzzywuzzy would take python-Levenshtein silently wherever something installed it.
    """
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


@_metric("code_sim")
def code_sim_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Similarity of the first predicted line that is neither a comment nor a code fence."""
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return fuzzy_ratio(next(code, ""), truth) / 100


@_metric("exact_match")
def exact_match_score(prediction: str, truth: str, classes: Sequence[str] | None = None) -> float:
    """Whether the prediction is the answer and nothing else. Not one of LongBench's: for tasks of a tasks.json."""
    return float(prediction.strip() == truth.strip())
