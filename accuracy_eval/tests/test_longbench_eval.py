"""Scoring of prediction folders: result.json as the official scorer writes it, and what the table tells."""

from __future__ import annotations

import json

import pytest
from benchmarks.longbench import evaluate, scoring
from benchmarks.longbench.tasks import NAMES, longbench_tasks
from longbench_helpers import write_jsonl

TASKS = longbench_tasks()


def prediction(pred, *answers, classes=None, length=100, **more):
    return {"pred": pred, "answers": list(answers), "all_classes": classes, "length": length, **more}


# A few rows of each data set and the score that the official scorer gives them.
EXAMPLES = {
    "narrativeqa": ([prediction("the red car", "a blue car", "red"), prediction("x", "y")], 33.33),
    "qasper": ([prediction("unanswerable", "Unanswerable.")], 100.0),
    "multifieldqa_en": ([prediction("in the year 1999", "1999")], 50.0),
    "multifieldqa_zh": ([prediction("厦门大学举办", "厦门大学。")], 66.67),
    "hotpotqa": ([prediction("yes", "yes"), prediction("no", "yes"), prediction("yes", "yes")], 66.67),
    "2wikimqa": ([prediction("John Smith", "John A. Smith")], 100.0),
    "musique": ([prediction("one two three", "three four")], 40.0),
    "dureader": ([prediction("我喜欢苹果", "我喜欢香蕉")], 66.67),
    "gov_report": ([prediction("the cat sat. the dog ran", "the dog ran. the cat sat")], 100.0),
    "qmsum": ([prediction("a b c d", "a c d b")], 75.0),
    "multi_news": ([prediction("", "something"), prediction("same words", "same words")], 50.0),
    "vcsum": ([prediction("会议讨论了预算", "会议讨论了计划")], 75.0),
    "trec": (
        [
            prediction("\nNumber\nDate", "Number", classes=["ignored"]),
            prediction("Date, Number", "Number", classes=["Date", "Number"]),
        ],
        75.0,
    ),
    "triviaqa": ([prediction("\n\nParis\nQuestion: what", "Paris"), prediction("a\nParis", "Paris")], 50.0),
    "samsum": ([prediction("\nthey meet\nDialogue: x y z", "they meet")], 100.0),
    "lsht": ([prediction("体育新闻\n财经", "体育", classes=["体育", "财经"])], 100.0),
    "passage_count": ([prediction("12 of 30", "12"), prediction("012", "12")], 25.0),
    "passage_retrieval_en": ([prediction("Paragraph 7, or 17?", "Paragraph 7")], 50.0),
    "passage_retrieval_zh": ([prediction("段落7", "段落7"), prediction("段落8", "段落7")], 50.0),
    "lcc": ([prediction("```python\nreturn x\n", "return x")], 100.0),
    "repobench-p": ([prediction("abcd # no\nabcd", "bcde")], 75.0),
}


def test_every_data_set_scores_as_officially(tmp_path, capsys):
    assert list(EXAMPLES) == NAMES
    folder = tmp_path / "pred/run"
    for name, (rows, _) in EXAMPLES.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    assert evaluate.main(["--model", "run", "--output_dir", str(tmp_path)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result == {name: expected for name, (_, expected) in EXAMPLES.items()}
    out = capsys.readouterr().out
    assert "has no config.json" in out
    english = [expected for name, (_, expected) in EXAMPLES.items() if TASKS[name].metric[-3:] != "_zh"]
    english.remove(EXAMPLES["lsht"][1])
    assert f"{sum(english) / 16:.2f}" in next(line for line in out.splitlines() if "English" in line)
    assert f"{sum(result.values()) / 21:.2f}" in out.splitlines()[-2]


def test_longbench_e_scores_by_length(tmp_path):
    lengths = (0, 3999, 4000, 7999, 8000, 20000)
    folder = tmp_path / "pred_e/run"
    write_jsonl(folder / "qasper.jsonl", [prediction("x", "x" if n % 2 else "y", length=n) for n in lengths])
    write_jsonl(folder / "lcc.jsonl", [prediction("x", "x", length=5000)])
    write_jsonl(folder / "config.json", [{"benchmark": "longbench-e"}])
    assert evaluate.main(["--model", "run", "--output_dir", str(tmp_path), "--e"]) == 0
    assert json.loads((folder / "result.json").read_text()) == {
        "qasper": {"0-4k": 50.0, "4-8k": 50.0, "8k+": 0.0},
        "lcc": {"0-4k": None, "4-8k": 100.0, "8k+": None},
    }


def test_mean_and_rounding_are_the_official_ones():
    third = scoring.Predictions(["x", "a x", "b c x"], [["x"]] * 3, [1, 1, 1])
    expected = round(100 * (1.0 + 1.0 + 0.5) / 3, 2)  # the article does not count
    assert scoring.score(TASKS["qasper"], third) == expected
    assert scoring.score_by_length(TASKS["qasper"], third)["0-4k"] == expected


def config(folder, datasets, **more):
    write_jsonl(folder / "config.json", [{"benchmark": "longbench", "datasets": datasets, **more}])


def test_an_unfinished_run_says_how_many_rows_are_there(tmp_path, capsys):
    folder = tmp_path / "run"
    write_jsonl(folder / "qasper.jsonl", [prediction("x", "x")] * 3)
    with (folder / "qasper.jsonl").open("a") as file:
        file.write('{"pred": "cut o')
    write_jsonl(folder / "lcc.jsonl", [prediction("x", "x")] * 5)
    config(
        folder,
        {
            "qasper": {"rows": 200, "expected": 200, "task": TASKS["qasper"].describe()},
            "lcc": {"rows": 500, "expected": 5, "task": TASKS["lcc"].describe()},
            "trec": {"rows": 200, "expected": 200, "task": TASKS["trec"].describe()},
        },
    )
    assert evaluate.main(["--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "INCOMPLETE" in out and "qasper: 3 of 200 rows" in out and "trec: 0 of 200 rows" in out
    assert "5 of 5 rows (limited; the data has 500)" in out and "lcc: " not in out
    assert json.loads((folder / "result.json").read_text()) == {"qasper": 100.0, "lcc": 100.0}


def test_a_folders_own_tasks_are_scored_as_its_config_says(tmp_path):
    folder = tmp_path / "run"
    task = {"prompt": "", "max_new_tokens": 1, "metric": "retrieval", "first_line": True}
    write_jsonl(folder / "mine.jsonl", [prediction("3\n4", "Paragraph 3")])
    config(folder, {"mine": {"rows": 1, "expected": 1, "task": task}})
    assert evaluate.main(["--model", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text()) == {"mine": 100.0}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no predictions"),
        ({"nq": [prediction("x", "x")]}, "no metric is known for nq"),
        ({"qasper": [{"pred": "x"}]}, "qasper.jsonl, line 1: missing answers, all_classes, length"),
        ({"qasper": [prediction("x") | {"answers": "x"}]}, "answers must be a list"),
        ({"trec": [prediction("x", "x")]}, "trec.jsonl: cannot be scored: classification needs all_classes"),
        ({"passage_count": "{"}, "passage_count.jsonl, line 1: not valid JSON"),
    ],
)
def test_what_cannot_be_scored(tmp_path, capsys, files, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, rows in files.items():
        if isinstance(rows, str):
            (folder / f"{name}.jsonl").write_text(rows + "\n")
        else:
            write_jsonl(folder / f"{name}.jsonl", rows)
    assert evaluate.main(["--model", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_folder_lists_the_ones_there_are(tmp_path, capsys):
    (tmp_path / "pred/one").mkdir(parents=True)
    assert evaluate.main(["--model", "two", "--output_dir", str(tmp_path)]) == 2
    assert "there are: one" in capsys.readouterr().err
    config(tmp_path / "pred/one", {})
    assert evaluate.main(["--model", str(tmp_path / "pred/one"), "--e"]) == 2
    assert "score it without --e" in capsys.readouterr().err
