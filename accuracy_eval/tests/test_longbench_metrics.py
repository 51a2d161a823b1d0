"""Metrics against values computed by hand and against other formulations of the same definitions."""

from __future__ import annotations

import random
import re
import string
import subprocess
import sys

import pytest
from benchmarks.longbench import metrics
from benchmarks.longbench.metrics import METRICS
from longbench_helpers import ACCURACY_EVAL
from rouge import Rouge


def score(metric: str, prediction: str, truth: str, classes=None) -> float:
    return METRICS[metric](prediction, truth, classes)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),  # case, article and punctuation do not count
        ("a red car", "the blue car", 0.5),  # red car / blue car: 1 of 2 and 1 of 2
        ("paris paris", "paris", 2 * 0.5 * 1 / 1.5),
        ("x y z", "z", 2 * (1 / 3) / (4 / 3)),
        ("the", "the", 0.0),  # nothing is left of either
        ("", "paris", 0.0),
        ("e-mail", "email", 1.0),
        ("don\u2019t", "dont", 0.0),  # only ASCII punctuation is dropped
    ],
)
def test_qa_f1(prediction, truth, expected):
    assert score("qa_f1", prediction, truth) == pytest.approx(expected, abs=1e-15)


def test_qa_f1_equals_a_formulation_over_matched_words():
    def by_matching(prediction, truth):
        def words(text):
            text = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
            return [w for w in re.sub(r"\b(?:an?|the)\b", "", text).split() if w]

        predicted, left = words(prediction), words(truth)
        total, matched = len(predicted) + len(left), 0
        for word in predicted:
            if word in left:
                left.remove(word)
                matched += 1
        return 2 * matched / total if matched else 0.0

    pick = random.Random(0)
    for _ in range(300):
        texts = [" ".join(pick.choices(["a", "The", "cat,", "cat", "Dog", "x.", "!"], k=5)) for _ in "ab"]
        assert score("qa_f1", *texts) == pytest.approx(by_matching(*texts), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("厦门大学", "厦门大学。", 1.0),  # the full stop does not count
        ("北京大学", "清华大学", 0.0),  # jieba takes each name as one word
        ("", "厦门大学", 0.0),
        ("我 喜欢 苹果", "我喜欢苹果", 1.0),  # white space does not count
        ("我喜欢苹果", "我喜欢", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
    ],
)
def test_qa_f1_zh(prediction, truth, expected):
    assert score("qa_f1_zh", prediction, truth) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "the cat ran", 2 / 3),  # two of three words in order, both ways
        ("sat cat the", "the cat sat", 1 / 3),  # the longest common subsequence is one word
        ("x y", "a b", 0.0),
        ("", "a b", 0.0),  # 'Hypothesis is empty.'
        ("...", "a b", 0.0),
        ("a b", "", 0.0),
        ("b c. a", "a. b c", 1.0),  # a full stop ends a sentence, and sentences may come in any order
    ],
)
def test_rouge(prediction, truth, expected):
    assert score("rouge", prediction, truth) == pytest.approx(expected, abs=1e-7)


def test_rouge_equals_its_definition_over_one_sentence_without_repeats():
    def subsequence(x, y):
        if not x or not y:
            return 0
        if x[-1] == y[-1]:
            return 1 + subsequence(x[:-1], y[:-1])
        return max(subsequence(x[:-1], y), subsequence(x, y[:-1]))

    pick = random.Random(1)
    for _ in range(100):
        x, y = (pick.sample("abcdefgh", pick.randint(1, 6)) for _ in "xy")
        common = subsequence(x, y)
        expected = 2 * common / (len(x) + len(y))
        assert score("rouge", " ".join(x), " ".join(y)) == pytest.approx(expected, abs=1e-6)


def test_rouge_zh_is_over_jiebas_words():
    assert score("rouge_zh", "我喜欢苹果", "我喜欢苹果") == pytest.approx(1.0, abs=1e-7)
    # 我 / 喜欢 / 苹果 and 我 / 喜欢 / 香蕉
    assert score("rouge_zh", "我喜欢苹果", "我喜欢香蕉") == pytest.approx(2 / 3, abs=1e-7)
    assert score("rouge_zh", "", "我") == 0.0


def test_the_depth_of_the_stack_does_not_decide_which_rouge_pair_is_too_long():
    # `rouge` recurses once per word of both; at Python's limit the official scorer has a 0. The count below
    # is of the official loop in a plain script; this test calls the same metric from deep inside pytest.
    script = """
from rouge import Rouge
def rouge_score(prediction, truth):
    try:
        return Rouge().get_scores([prediction], [truth], avg=True)["rouge-l"]["f"]
    except RecursionError:
        return 0.0
def scorer(lengths):
    scores = []
    for n in lengths:
        scores.append(rouge_score("same" + " x" * n, "same" + " y" * 480))
    return scores
print(sum(score > 0 for score in scorer(range(508, 514))))
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout

    def deep(levels):
        if levels:
            return deep(levels - 1)
        return sum(score("rouge", "same" + " x" * n, "same" + " y" * 480) > 0 for n in range(508, 514))

    assert 0 < int(printed) < 6
    assert deep(100) == int(printed)


@pytest.mark.parametrize(
    ("prediction", "truth", "classes", "expected"),
    [
        ("Number", "Number", ["Date", "Number"], 1.0),
        ("Number or Date", "Number", ["Date", "Number"], 0.5),
        ("Date", "Number", ["Date", "Number"], 0.0),
        ("nothing of it", "Number", ["Date", "Number"], 0.0),
        ("Other location", "Other location", ["location", "Other location"], 1.0),  # part of the right one
        ("Other location", "location", ["location", "Other location"], 0.5),  # not the other way round
        # 'Other' is dropped, and the walk then skips 'location', which stays: officially so
        ("Other location", "Other location", ["Other", "location", "Other location"], 1 / 2),
        ("Other location", "Other location", ["Other", "x", "Other location", "location"], 1.0),
    ],
)
def test_classification(prediction, truth, classes, expected):
    assert score("classification", prediction, truth, classes) == expected


def test_classification_without_classes_says_so():
    with pytest.raises(ValueError, match="all_classes"):
        score("classification", "x", "x", None)


@pytest.mark.parametrize(
    ("metric", "prediction", "truth", "expected"),
    [
        ("count", "7", "7", 1.0),
        ("count", "There are 7 of 10", "7", 0.5),
        ("count", "07", "7", 0.0),  # compared as strings
        ("count", "seven", "7", 0.0),
        ("retrieval", "Paragraph 3", "Paragraph 3", 1.0),
        ("retrieval", "3", "Paragraph 3", 1.0),
        ("retrieval", "Paragraph 3, not 13 or 4", "Paragraph 3", 1 / 3),
        ("retrieval", "", "Paragraph 3", 0.0),
        ("retrieval_zh", "段落27", "段落27", 1.0),
        ("retrieval_zh", "段落2和段落27", "段落27", 0.5),
    ],
)
def test_counting_and_retrieval(metric, prediction, truth, expected):
    assert score(metric, prediction, truth) == expected


def test_a_ground_truth_without_a_paragraph_says_so():
    with pytest.raises(ValueError, match="Paragraph"):
        score("retrieval", "3", "3")


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("return x", "return x", 1.0),
        ("\n\nreturn x\nmore", "return x", 1.0),  # the first line
        ("# note\n```\n// note\nreturn x", "return x", 1.0),  # which is neither a comment nor a fence
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("# only a comment", "return x", 0.0),
        ("", "", 1.0),
    ],
)
def test_code_similarity(prediction, truth, expected):
    assert score("code_sim", prediction, truth) == expected


def test_the_ratio_is_fuzzywuzzys_without_levenshtein(monkeypatch):
    import difflib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fuzzywuzzy import fuzz
    monkeypatch.setattr(fuzz, "SequenceMatcher", difflib.SequenceMatcher)  # even if Levenshtein is installed
    pick = random.Random(2)
    for _ in range(300):
        first, second = ("".join(pick.choices("ab (x)", k=pick.randint(0, 12))) for _ in "fs")
        assert metrics.fuzzy_ratio(first, second) == fuzz.ratio(first, second)


def test_scoring_is_quiet():
    script = f"import sys; sys.path.insert(0, {str(ACCURACY_EVAL)!r})\n"
    script += "from benchmarks.longbench.metrics import METRICS\n"
    script += "[METRICS[m]('段落1 x', '段落1 Paragraph 1', ['x']) for m in METRICS]"
    done = subprocess.run([sys.executable, "-W", "default", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rouge_is_the_version_the_benchmark_pins():
    # 0.x of the package has another ROUGE-L: over the whole text, and with repeated words counted
    assert Rouge().get_scores("a a b", "a b b")[0]["rouge-l"]["f"] == pytest.approx(1.0, abs=1e-6)
