"""The bundled data and model: rows say what they claim, and the model answers them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo.batches import layout, make_batch
from demo.check import answers, is_right
from demo.make_data import DENSITY, ROWS, SEED, TASK_NAMES, TOKENS, make_row, make_rows, tasks_json
from demo.tasks import PLACEHOLDERS, TASKS, VOCABULARY, Rng
from demo.tokenizer import build_tokenizer
from demo.words import to_text, to_words
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "demo"
KEYS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}


def solve(row: dict) -> str:
    """The answer read off the text with regular expressions, independently of the generator."""
    text = row["context"].replace("\n", " ")
    if row["dataset"] == "homes":
        person = re.fullmatch(r"Where does (\w+) live\?", row["input"])[1]
        return re.search(rf"The (\w+) is where {person} lives now\.", text)[1]
    if row["dataset"] == "residents":
        name = re.fullmatch(r"Where does (\w+ \w+) live\?", row["input"])[1]
        return re.search(rf"The ledger now has ({name} \w+)\.", text)[1]
    if row["dataset"] == "managers":
        name = re.fullmatch(r"Who employs (\w+ \w+) and where\?", row["input"])[1]
        boss = re.search(rf"The ledger has {name} (\w+ \w+)\.", text)[1]
        return f"{name} " + re.search(rf"The ledger now has ({boss} \w+)\.", text)[1]
    if row["dataset"] == "groups":
        person = re.fullmatch(r"What group has (\w+)\?", row["input"])[1]
        return re.search(rf"The group holds ({person} \w+ \w+ \w+)\.", text)[1]
    if row["dataset"] == "stores":
        person, thing = re.fullmatch(r"Where does (\w+) keep the (\w+)\?", row["input"]).groups()
        return re.search(rf"The (\w+) holds the {thing} of {person}\.", text)[1]
    if row["dataset"] == "employers":
        person = re.fullmatch(r"Who employs (\w+) and where\?", row["input"])[1]
        boss = re.search(rf"(\w+) hired {person} in the early spring\.", text)[1]
        return f"{boss} in the " + re.search(rf"The (\w+) is where {boss} lives now\.", text)[1]
    if row["dataset"] == "abstracts":
        return re.search(rf"Abstract: ({row['input'].removesuffix('.')} \d+)\.", text)[1]
    if row["dataset"] == "paragraphs":
        return re.search(rf"(Paragraph \d+): {re.escape(row['input'])}", text)[1]
    noun = re.fullmatch(r"What group has the (\w+)\?", row["input"])[1]
    from demo.words import CATEGORY_WORDS

    kind = next(words for words in CATEGORY_WORDS.values() if noun in words)
    shown = re.findall(r"The (\w+) group holds the (\w+) too\.", text)
    shown += [(label, noun) for noun, label in re.findall(r"The group now has the (\w+) (\w+)\.", text)]
    told = {label for label, other in shown if other in kind}
    assert len(told) == 1 and not re.search(rf"\b{noun}\b", text), "one label a kind, and the noun is unseen"
    return f"{noun} {told.pop()}" if row["dataset"] == "kinds" else f"{told.pop()} group"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [128, 1024])
def test_answers_follow_from_the_context(name, tokens):
    for index in range(8):
        row = make_row(name, seed=3, index=index, tokens=tokens, density=0.5)
        assert set(row) == KEYS and row["dataset"] == name
        assert row["answers"] == [solve(row)]
        assert row["all_classes"] is None or row["answers"][0] in row["all_classes"]


@pytest.mark.parametrize("name", TASKS)
def test_facts_asked_for_are_told_once(name):
    row = make_row(name, seed=4, index=0, tokens=2048, density=0.9)
    sentences = re.findall(r"[^.]+\.", row["context"].replace("\n", " "))
    assert len(sentences) > 200 and all(len(to_words(s)) == 8 for s in sentences)
    if name in ("homes", "employers"):
        people = re.findall(r"where (\w+) lives", row["context"])
        assert len(people) == len(set(people)) > 50


def test_rows_are_a_function_of_their_arguments():
    again = make_rows("homes", 3, (128, 256), seed=1, density=0.4)
    assert again == make_rows("homes", 5, (128, 256), seed=1, density=0.4)[:3]
    assert again != make_rows("homes", 3, (128, 256), seed=2, density=0.4)


def test_bundled_data_is_what_make_data_makes():
    assert json.loads((DEMO / "data" / "tasks.json").read_text()) == {n: tasks_json()[n] for n in TASK_NAMES}
    for name in TASK_NAMES:
        lines = (DEMO / "data" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == ROWS
        assert json.loads(lines[1]) == make_row(name, SEED, 1, TOKENS[1], DENSITY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope", 0, 0, 128, 0.5), "homes"),
        (("homes", 0, 0, 8, 0.5), "64 to 4096"),
        (("homes", 0, 0, 128, 0), "density"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_row(*arguments)


def test_tokenizer():
    bundled = AutoTokenizer.from_pretrained(DEMO / "demo-llama")
    assert bundled.convert_ids_to_tokens(range(len(bundled))) == VOCABULARY
    for tokenizer in (bundled, build_tokenizer(4096)):
        for name, task in TASKS.items():
            row = make_row(name, seed=5, index=0, tokens=512, density=0.5)
            prompt = task.prompt.format(**row)
            ids = tokenizer(prompt).input_ids
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids and len(ids) <= 512
            assert tokenizer.decode(ids, skip_special_tokens=True) == to_text(to_words(prompt))


def test_training_rows_are_prompts_with_answers():
    """What training sees is, word for word, what the pipeline asks, question after question."""
    batch = make_batch(Rng(seed=6), rows_per_task=2, sentences=4, density=(0.5, 1.0))
    length, columns = layout(4)
    assert batch.shape == (2 * len(TASKS), length)
    for index, (name, task) in enumerate(TASKS.items()):
        words = [VOCABULARY[i] for i in batch[2 * index].tolist()]
        assert words[1 : 1 + len(task.head.split())] == task.head.split()
        pattern = [part for part in task.answer.split() if part not in PLACEHOLDERS]
        for answer in columns[name]:
            said = [words[column + 1] for column in answer.tolist()]
            assert said[-1] == "</s>" and set(pattern) <= set(said)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "demo-llama", dtype=torch.float32).eval()


@pytest.mark.parametrize("name", TASK_NAMES)
def test_bundled_model_answers(model, name):
    """Dense, and from a cache pruned to 70 % by check.py's own few lines."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "demo-llama")
    right = torch.zeros(2, dtype=torch.int)
    for index in range(6):
        row = make_row(name, seed=7, index=index, tokens=700, density=0.45)
        prompt = tokenizer(TASKS[name].prompt.format(**row)).input_ids
        said = answers(model, prompt, [(0.0, 0.0), (0.7, 0.7)], TASKS[name].max_new_tokens)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        right += torch.tensor([is_right(text, row) for text in texts])
    assert (right >= 5).all(), right.tolist()


def test_bundle_is_small():
    assert sum(path.stat().st_size for path in (DEMO / "demo-llama").iterdir()) < 16e6
