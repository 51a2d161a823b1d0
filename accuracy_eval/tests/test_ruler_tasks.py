"""RULER's rows: what they ask can be answered from them, they fit their length, and they follow from the seed."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import subprocess
import sys

import pytest
from benchmarks.ruler import documents, generate
from benchmarks.ruler.tasks import GROUPS, LENGTHS, TASKS, select_lengths, select_tasks
from benchmarks.ruler.words import pseudo_words
from benchmarks.shared.errors import UserError
from longbench_helpers import ACCURACY_EVAL, make_tokenizer

DEMO = ACCURACY_EVAL / "demo/demo-llama"
ESSAYS = generate.Essays([f"word{i}{'.' if i % 9 == 0 else ''}" for i in range(300)], "digest")


@pytest.fixture(scope="module")
def demo_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Subwords: byte-level BPE with a few hundred merges, trained here."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([DEMO.parent.joinpath("README.md").read_text()] * 3, vocab_size=600)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>")


class Letters:
    """A tokenizer whose ids are the characters' codes, so that a row's text can be read back."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


def make(name, length, index=0, *, seed=1, tokenizer=None, sources=None, template="none"):
    tokenizer, sources = tokenizer or Letters(), sources or generate.Sources()
    return generate.make_row(
        TASKS[name], length, index, seed=seed, tokenizer=tokenizer, template=template, sources=sources
    )


def text(row):
    return "".join(map(chr, row["ids"]))


def corpus():
    content = {"data": []}
    for article in range(4):
        paragraphs = []
        for number in range(5):
            name = f"thing {article} {number}"
            qas = [
                {"question": f"What is {name}?", "answers": [{"text": f"a {name} indeed"}]},
                {"question": "What is not there?", "answers": [], "is_impossible": True},
            ]
            paragraphs.append({"context": f"It is said that {name} is a {name} indeed. " * 3, "qas": qas})
        content["data"].append({"paragraphs": paragraphs})
    return content


def hotpot():
    entries = []
    for n in range(6):
        context = [[f"Title {n}.{k}", [f"Sentence {n}.{k}. ", "More."]] for k in range(3)]
        entries.append({"question": f"Which {n}?", "answer": f"Sentence {n}.1", "context": context})
    return entries


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(corpus()))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot()))
    found = generate.Sources(ESSAYS)
    found.corpora = {name: documents.load_corpus(name, tmp_path) for name in documents.SOURCES}
    return found


def test_there_are_the_thirteen_tasks():
    assert (
        list(TASKS)
        == (
            "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 "
            "niah_multivalue niah_multiquery vt cwe fwe qa_1 qa_2"
        ).split()
    )
    assert len(GROUPS["synthetic"]) == 11 and len(GROUPS["niah"]) == 8
    budgets = {task.family: task.max_new_tokens for task in TASKS.values()}
    assert budgets == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert LENGTHS == (4096, 8192, 16384, 32768, 65536, 131072)
    assert [task.name for task in select_tasks(["vt", "niah", "vt"])] == ["vt", *GROUPS["niah"]]


@pytest.mark.parametrize("essays", [None, ESSAYS])
@pytest.mark.parametrize("name", GROUPS["niah"])
def test_needles_are_found_by_their_keys(name, essays):
    row = make(name, 9000, sources=generate.Sources(essays))
    context, question = text(row).rsplit("\nWhat ", 1)
    pattern = r"One of the special magic (\w+) for (\S+) is: (\S+)\."
    values = collections.defaultdict(list)
    for kind, key, value in re.findall(pattern, context):
        values[key].append(value)
        assert kind == TASKS[name].options["value"]
    query = re.match(r".* for (.*) mentioned in the provided text\?", question)[1]
    keys = re.split(r", and |, ", query)
    assert len(keys) == TASKS[name].options.get("queries", 1)
    assert sorted(row["outputs"]) == sorted(value for key in keys for value in values[key])
    assert len(row["outputs"]) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    end = "are" if len(row["outputs"]) == 4 else "is"
    assert question.endswith(f"for {query} mentioned in the provided text {end}")
    if name == "niah_multikey_1":
        assert len(values) == 4
    if TASKS[name].options["haystack"] == "needle":
        assert len(values) > 50 and "grass" not in context
    elif essays and TASKS[name].takes_essays:
        assert "word7 word8" in context and "grass" not in context
    else:
        assert context.count("The grass is green.") > 50


def test_variables_can_be_tracked():
    row = make("vt", 9000)
    example, asked = text(row).split("\n\nMemorize and track")
    for part, letters in ((example, 3), (asked, 5)):
        value = re.search(r"assigned the value (\d+) in the text", part)[1]
        found = re.findall(rf"VAR (\w+) = {value}\n", part)
        for name, before in re.findall(r"VAR (\w+) = VAR (\w+)\n", part):
            assert before == found[-1] and len(name) == letters
            found.append(name)
        assert len(found) == 5
    assert found == row["outputs"] and asked.endswith(
        f"5 variables are assigned the value {value}, they are: "
    )


@pytest.mark.parametrize(("length", "often"), [(3000, 6), (12000, 30)])
def test_common_words_are_the_most_common(length, often):
    row = make("cwe", length)
    listed = text(row).split("\n")[-2]
    count = collections.Counter(re.findall(r"\d+\. (\w+)", listed))
    assert sorted(word for word, _ in count.most_common(10)) == sorted(row["outputs"])
    assert set(count.values()) == {often, 3}
    assert text(row).count("most common words in the above list?") == 2  # the solved example's and the row's


def test_frequent_words_are_the_most_frequent():
    row = make("fwe", 9000)
    coded = text(row).split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = collections.Counter(coded).most_common(5)
    assert [word for word, _ in ranked[:4]] == ["....", *row["outputs"]]
    assert len({number for _, number in ranked}) == 5


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_are_asked_among_documents(name, sources):
    orders = set()
    for index in range(5):
        row = make(name, 1900, index, sources=sources)
        numbers = re.findall(r"^Document (\d+):$", text(row), re.MULTILINE)
        assert numbers == [str(i) for i in range(1, len(numbers) + 1)] and len(numbers) >= 4
        assert row["outputs"][0] in text(row) and text(row).endswith("? Answer:")
        if name == "qa_1":
            assert f"What is thing 0 {index}?" in text(row)
        orders.add(text(row).index(row["outputs"][0]) // 200)
    assert len(orders) > 1
    whole = make(name, 10**5, sources=sources)  # no more documents than there are
    assert text(whole).count("\nDocument ") == len(sources.corpora[TASKS[name].source].documents)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("which", ["demo_tokenizer", "byte_tokenizer"])
def test_a_row_fills_its_length_and_never_exceeds_it(name, which, request, sources):
    tokenizer = request.getfixturevalue(which)
    lengths = (700, 4096) if which == "demo_tokenizer" else (2500,)
    for length in lengths:
        if TASKS[name].source and length != 700:
            continue  # the test's documents are few
        row = make(name, length, 3, tokenizer=tokenizer, sources=sources)
        assert row["length"] == len(row["ids"]) + TASKS[name].max_new_tokens <= length
        item = 300 if name == "cwe" else 120  # an item of cwe is a word that appears three times
        assert TASKS[name].source or row["length"] > length - item


@pytest.mark.parametrize("limit", [0, 1, 17, 999, 12345])
@pytest.mark.parametrize("most", [None, 3, 400])
def test_the_largest_count_is_found_in_few_steps(limit, most):
    for size in (lambda n: 3 * n, lambda n: n // 7, lambda n: n * n // 50, lambda n: n + n % 3 // 2):
        found, steps = search(size, limit, most)
        assert size(found) <= limit and (found == most or size(found + 1) > limit)
        assert steps < 40
    found, steps = search(lambda n: 50 + 25 * n, 131072, None)
    assert found == 5240 and steps <= 5


def search(size, limit, most):
    steps = 0

    def counted(count):
        nonlocal steps
        steps += 1
        return size(count)

    return generate.largest(counted, limit, 0, size(0), most), steps


def test_rows_follow_from_the_seed_alone(demo_tokenizer):
    names = GROUPS["synthetic"]
    rows = {name: make(name, 900, 5, tokenizer=demo_tokenizer) for name in names}
    again = {name: make(name, 900, 5, tokenizer=demo_tokenizer) for name in reversed(names)}
    assert rows == again
    for name in ("niah_single_1", "vt"):
        letters = make(name, 4000, 5)
        assert letters != make(name, 4000, 6) and letters != make(name, 4000, 5, seed=2)
        assert letters["outputs"] != make(name, 4001, 5)["outputs"]
    script = (
        "import hashlib; from benchmarks.ruler import generate as g; from benchmarks.ruler.tasks import TASKS\n"
        "class T:\n    def __call__(self, t, **o): return {'input_ids': [ord(c) for c in t]}\n"
        "print([hashlib.sha256(str(g.make_row(TASKS[n], 4000, 0, seed=1, tokenizer=T(), template='none', "
        "sources=g.Sources())).encode()).hexdigest() for n in ('niah_multiquery', 'cwe', 'fwe')])"
    )
    here = [make(name, 4000) for name in ("niah_multiquery", "cwe", "fwe")]
    run = [sys.executable, "-c", script]
    printed = subprocess.run(run, cwd=ACCURACY_EVAL, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([hashlib.sha256(str(row).encode()).hexdigest() for row in here])


def test_the_chat_template_goes_around_the_prompt_and_the_answers_beginning_follows():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<s> <user> {{ messages[0]['content'] }} <bot>"
    row = make("niah_single_1", 600, tokenizer=tokenizer, template="model")
    end = tokenizer(
        " The special magic number for x mentioned in the provided text is", add_special_tokens=False
    )
    assert row["ids"][:2] == tokenizer.convert_tokens_to_ids(["<s>", "<user>"]) and row["ids"].count(1) == 1
    assert row["ids"][-len(end["input_ids"]) - 1] == tokenizer.convert_tokens_to_ids("<bot>")


def test_pseudo_words_are_different_and_none_is_part_of_another():
    words = pseudo_words()
    assert len(set(words)) == len(words) == 65450 and {len(word) for word in words} == {5}


def test_what_cannot_be_generated_says_why(tmp_path):
    with pytest.raises(
        UserError, match=r"unknown RULER task 'niah'?.*valid ones: niah_single_1, .*qa_2 \(or all"
    ):
        select_tasks(["niah_single_4"])
    with pytest.raises(UserError, match=r"--lengths 8192: tiny takes 4096 tokens.*choose lengths up to 4096"):
        select_lengths([1024, 8192], 4096, "tiny")
    with pytest.raises(UserError, match="tiny takes 512 tokens, less than RULER's shortest"):
        select_lengths(None, 512, "tiny")
    assert select_lengths(None, 16384, "x") == [4096, 8192, 16384]
    assert select_lengths([2048, 1024, 2048], None, "x") == [1024, 2048]
    with pytest.raises(UserError, match=r"vt_300, row 0: needs \d+ tokens at least"):
        make("vt", 300)
    with pytest.raises(UserError, match=r"no squad.json or dev-v2.0.json in .*qa_1.*SQuAD(.|\n)*--data_dir"):
        documents.load_corpus("squad", tmp_path)
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "not in the format"),
        ('{"data": []}', "no questions"),
    ):
        (tmp_path / "squad.json").write_text(content)
        with pytest.raises(UserError, match=message):
            documents.load_corpus("squad", tmp_path)
    for name, content, message in (
        ("none.txt", None, "No such file"),
        ("empty.txt", " \n", "is empty"),
        ("bad.json", "[1]", "neither UTF-8 text nor JSON"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            generate.load_essays(tmp_path / name)
    (tmp_path / "good.json").write_text('{"text": "One  two.\\nThree."}')
    assert generate.load_essays(tmp_path / "good.json").words == ["One", "two.", "Three."]
