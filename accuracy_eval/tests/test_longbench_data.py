"""What LongBench defines (tasks, prompts, rows and their source), and messages for what is malformed."""

from __future__ import annotations

import json
import zipfile

import pytest
from benchmarks.longbench import data, prompts, tasks
from benchmarks.shared.chat import resolve_chat_template, with_chat_template
from benchmarks.shared.errors import UserError
from longbench_helpers import make_rows, make_tokenizer, write_jsonl

TASKS = tasks.longbench_tasks()
REAL_ROWS = [parent / "shared/longbench" for parent in data.DEFAULT_DIR.parents]


def test_the_data_sets():
    assert len(tasks.NAMES) == 21 and len(tasks.ENGLISH) == 16
    assert len(tasks.LONGBENCH_E) == 13 and set(tasks.LONGBENCH_E) < set(tasks.ENGLISH)
    assert not {"narrativeqa", "musique", "qmsum"} & set(tasks.LONGBENCH_E)


def test_generation_limits():
    limits = {
        32: "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en passage_retrieval_zh",
        64: "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p",
        128: "narrativeqa qasper samsum dureader",
        512: "gov_report qmsum multi_news vcsum",
    }
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == {
        name: limit for limit, names in limits.items() for name in names.split()
    }


def test_special_treatment_of_some_data_sets():
    def having(flag):
        return {name for name, task in TASKS.items() if getattr(task, flag)}

    assert set(TASKS) - having("chat") == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert having("first_line") == {"trec", "triviaqa", "samsum", "lsht"}
    assert having("stop_at_newline") == {"samsum"}


def test_prompts_take_the_context_and_mostly_the_input():
    row = {"context": "CONTEXT", "input": "INPUT"}
    without_input = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    for name, task in TASKS.items():
        filled = prompts.fill(task, row)
        assert filled.count("CONTEXT") == 1 and filled.count("INPUT") == (name not in without_input)
        assert "{" not in filled
    assert prompts.fill(TASKS["trec"], row).endswith("examples of questions.\n\nCONTEXT\nINPUT")
    assert prompts.fill(TASKS["lcc"], row) == (
        "Please complete the code given below. \nCONTEXTNext line of code:\n"
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [("Llama-2-7b-hf", 4096), ("Meta-Llama-3-8B-Instruct", 8192), ("Mistral-7B-Instruct-v0.2", 31500)],
)
def test_prompt_limits_of_the_papers_models(model, expected):
    assert tasks.config("model2maxlen")[model] == expected


class Letters:
    """One token per character, and a special token 0 in front, written as ^ where it is not skipped."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [0, *map(ord, text)]}

    def decode(self, tokens, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens if token)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (11, "abcdefghij"),  # fits, with its special token
        (10, "abcdfghij"),  # first 5 with the special token, last 5
        (7, "abhij"),  # int(7 / 2) of each
        (2, "j"),
    ],
)
def test_long_prompts_lose_their_middle(limit, expected):
    assert prompts.truncate("abcdefghij", Letters(), limit) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Meta-Llama-3-8B-Instruct", "model"),
        ("Llama-3.1-8B-Instruct", "model"),
        ("Meta-Llama-3-8B", "none"),
        ("Llama-2-7b-hf", "none"),
        ("Llama-2-7b-chat-hf", "llama2"),
        ("Mistral-7B-Instruct-v0.2", "none"),  # as the paper's code; --chat_template model offers it
        ("longchat-7b-v1.5-32k", "vicuna"),
    ],
)
def test_chat_templates_by_name(model, expected):
    assert resolve_chat_template("auto", model, make_tokenizer()) == expected


def test_chat_template_comes_after_truncation_and_not_for_every_data_set():
    tokenizer = make_tokenizer()
    row = {"context": "w1 w2 w3 w4 w5 w6 w7 w8", "input": "w9"}
    chat = tasks.Task("x", "{context} {input}", 1, "qa_f1", chat=True)
    plain = tasks.Task("x", "{context} {input}", 1, "qa_f1", chat=False)

    def text(task, template):
        ids = prompts.encode(task, row, tokenizer, max_length=6, template=template)
        return tokenizer.decode(ids)

    # <s> w1 ... w9 is 10 tokens: 3 of each end, without the special token, which encoding adds again
    assert text(plain, "model") == "<s> w1 <unk> w8 w9"
    assert text(chat, "model").startswith("<s> <user> w1") and text(chat, "model").endswith("w9 <bot>")
    assert with_chat_template("x", "llama2", None) == "[INST]x[/INST]"


def test_a_missing_chat_template_is_an_error():
    with pytest.raises(UserError, match="--chat_template none"):
        resolve_chat_template("auto", "Llama-3-Instruct", Letters())


def test_only_a_line_feed_ends_a_line(tmp_path):
    rows = make_rows(2, context="one\u2028two\x85three\rfour\x0bfive")
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert data.parse_rows(content.encode(), "x", TASKS["trec"]) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl, line 2: not valid JSON"),
        ("[]", "rows.jsonl, line 2: expected an object, got list"),
        ('{"input": "", "answers": []}', "line 2: missing length, all_classes, context; a row of trec needs"),
        (json.dumps(make_rows(1, answers="one")[0]), "line 2: answers must be a list of strings, got 'one'"),
        (json.dumps(make_rows(1, all_classes="one")[0]), "line 2: all_classes must be null or a list"),
        (json.dumps(make_rows(1, length="3")[0]), "line 2: length must be a number"),
        ("\udcff", "line 2: not valid JSON"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(line, message):
    content = json.dumps(make_rows(1)[0]) + "\n" + line + "\n"
    with pytest.raises(UserError, match=message):
        data.parse_rows(content.encode("utf-8", "surrogateescape"), "rows.jsonl", TASKS["trec"])


def test_rows_are_found_in_the_folder_or_its_data_folder(tmp_path):
    write_jsonl(tmp_path / "trec.jsonl", make_rows(1))
    write_jsonl(tmp_path / "data/lcc.jsonl", make_rows(2))
    write_jsonl(tmp_path / "data/lcc_e.jsonl", make_rows(3))

    def count(name, longbench_e=False):
        return len(data.load_rows(TASKS[name], tmp_path, longbench_e=longbench_e).rows)

    assert (count("trec"), count("lcc"), count("lcc", True)) == (1, 2, 3)
    with pytest.raises(UserError, match=r"no trec_e\.jsonl in .* from what is there: lcc$"):
        count("trec", True)


def test_rows_come_out_of_the_hubs_archive(tmp_path, monkeypatch):
    import huggingface_hub

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc_e.jsonl", json.dumps(make_rows(1)[0]) + "\n")
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(data, "DEFAULT_DIR", tmp_path / "none")
    data._download.cache_clear()
    assert data.load_rows(TASKS["lcc"], None, longbench_e=True).rows == make_rows(1)
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
    with pytest.raises(UserError, match=r"does not hold data/trec\.jsonl"):
        data.load_rows(TASKS["trec"], None, longbench_e=False)
    data._download.cache_clear()


def test_without_data_and_network_it_says_what_to_download(tmp_path, monkeypatch):
    import huggingface_hub

    def download(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(data, "DEFAULT_DIR", tmp_path / "data")
    data._download.cache_clear()
    with pytest.raises(UserError) as error:
        data.load_rows(TASKS["lcc"], None, longbench_e=False)
    message = str(error.value)
    assert "https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip" in message
    assert f"{tmp_path}/data/narrativeqa.jsonl" in message and "--data_dir" in message
    write_jsonl(tmp_path / "data/lcc.jsonl", make_rows(1))  # done as told
    assert len(data.load_rows(TASKS["lcc"], None, longbench_e=False).rows) == 1


def test_selecting_data_sets():
    def names(*chosen, longbench_e=False):
        return [t.name for t in tasks.select_tasks(list(chosen) or None, None, longbench_e=longbench_e)]

    assert names() == tasks.NAMES and names(longbench_e=True) == tasks.LONGBENCH_E
    assert names("en") == tasks.ENGLISH and names("zh", "vcsum") == tasks.CHINESE
    assert names("all", longbench_e=True) == tasks.LONGBENCH_E
    with pytest.raises(UserError, match=r"unknown data set 'nq'; valid ones: narrativeqa, .*repobench-p"):
        names("nq")
    with pytest.raises(UserError, match="of LongBench-E 'vcsum'"):
        names("vcsum", longbench_e=True)


TASK = {"prompt": "{context}", "max_new_tokens": 3, "metric": "qa_f1", "chat": False, "first_line": True}


def test_a_data_folder_may_describe_tasks(tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": TASK}))
    (task,) = tasks.select_tasks(None, tmp_path, longbench_e=False)
    assert task == tasks.Task("mine", "{context}", 3, "qa_f1", chat=False, first_line=True)
    assert tasks.task_from_description("mine", task.describe(), "x") == task
    assert [t.name for t in tasks.select_tasks(["trec", "mine"], tmp_path, longbench_e=False)] == [
        "trec",
        "mine",
    ]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"mine": {"prompt": ""}}, "task 'mine' lacks max_new_tokens, metric"),
        ({"mine": TASK | {"max_new_token": 3}}, "unknown key 'max_new_token'"),
        ({"mine": TASK | {"metric": "f1"}}, "unknown metric 'f1'; valid ones: qa_f1, "),
        ({"mine": TASK | {"max_new_tokens": True}}, "max_new_tokens must be int, got True"),
        ({"mine": TASK | {"max_new_tokens": 0}}, "at least 1"),
        ({"trec": TASK}, "'trec' is a LongBench data set"),
        ({"../x": TASK}, "names a file"),
        ([], "must be an object"),
    ],
)
def test_malformed_tasks(tmp_path, described, message):
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=message):
        tasks.select_tasks(None, tmp_path, longbench_e=False)


@pytest.mark.skipif(not any(path.is_dir() for path in REAL_ROWS), reason="no real LongBench rows beside this")
def test_real_rows():
    folder = next(path for path in REAL_ROWS if path.is_dir())
    for path in sorted(folder.glob("*.jsonl")):
        task = TASKS[path.stem]
        rows = data.load_rows(task, folder, longbench_e=False).rows
        assert len(rows) == path.read_bytes().count(b"\n") > 0
        assert all(row["context"] in prompts.fill(task, row) for row in rows)
