"""RULER from the command lines down: predictions, resuming, refusals, scores."""

from __future__ import annotations

import json

import pytest
from benchmarks.longbench import evaluate as longbench_evaluate
from benchmarks.ruler import evaluate, predict, scoring
from benchmarks.ruler.tasks import TASKS
from benchmarks.shared import models
from longbench_helpers import ACCURACY_EVAL, make_model, read_jsonl, write_jsonl

DEMO = ACCURACY_EVAL / "demo/demo-llama"
DENSE = "tiny_K_0.0_V_0.0_group32_dense"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=1)


@pytest.fixture
def run(model, tmp_path, capsys):
    """Run a prediction in this process: run("0", "0", "dense", ...) -> (status, stdout, stderr)."""

    def predict_with(k, v, mode, *options, model=model, out=tmp_path / "out"):
        fixed = ["--output_dir", str(out), "--device", "cpu"]
        try:
            status = predict.main([k, v, str(model), mode, *fixed, *options])
        except SystemExit as stop:  # argparse's way out
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    predict_with.out = tmp_path / "out/pred_ruler"
    return predict_with


SMALL = ("--tasks", "fwe", "niah_single_2", "--lengths", "400", "512", "--rows", "2")


def test_a_run_and_its_scores(run, model, tmp_path, capsys):
    status, out, err = run("0", "0", "dense", *SMALL)
    assert status == 0, err
    assert "without --essays the haystack of niah_single_2 is the noise" in out and f"--model {DENSE}" in out
    folder = run.out / DENSE
    names = [f"{task}_{length}" for length in (400, 512) for task in ("fwe", "niah_single_2")]
    assert sorted(path.stem for path in folder.glob("*.jsonl")) == sorted(names)
    for name in names:
        records = read_jsonl(folder / f"{name}.jsonl")
        assert [record["_index"] for record in records] == [0, 1]
        limit = int(name.rsplit("_", 1)[1])
        for record in records:
            assert list(record) == ["pred", "answers", "length", "dataset", "_index"]
            assert limit - 60 < record["length"] <= limit and record["answers"] and record["dataset"] == name
    config = json.loads((folder / "config.json").read_text())
    assert (config["benchmark"], config["seed"], config["max_length"]) == ("ruler", 42, None)
    assert config["datasets"]["niah_single_2_512"]["task"]["haystack"] == "noise"
    assert evaluate.main(["--model", DENSE, "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2 of 13" in out and "INCOMPLETE" not in out and "not comparable to published" in out
    assert set(json.loads((folder / "result.json").read_text())) == set(names)
    assert longbench_evaluate.main(["--model", str(folder)]) == 2
    assert "score it with eval_ruler.py" in capsys.readouterr().err


def test_an_interrupted_run_resumes_without_losing_or_doubling_a_row(run, monkeypatch, tmp_path, capsys):
    options = ("--tasks", "fwe", "vt", "--lengths", "512", "--rows", "3")
    assert run("0", "0", "dense", *options)[0] == 0
    folder = run.out / DENSE
    whole = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    lines = whole["fwe_512.jsonl"].splitlines(keepends=True)
    (folder / "fwe_512.jsonl").write_bytes(lines[0] + lines[1][:20])  # killed in the middle of a write
    (folder / "vt_512.jsonl").unlink()
    assert evaluate.main(["--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "INCOMPLETE" in out and "fwe_512: 1 of 3 rows" in out and "vt_512: 0 of 3 rows" in out
    assert run("0", "0", "dense", *options)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == whole
    # More rows later: the first ones stay. A finished run loads no model.
    assert run("0", "0", "dense", *options[:-1], "4")[0] == 0
    assert {
        path.name: b"".join(path.read_bytes().splitlines(True)[:3]) for path in folder.glob("*.jsonl")
    } == whole
    monkeypatch.setattr(models, "load_model", None)
    assert run("0", "0", "dense", *options)[0] == 0


@pytest.mark.parametrize("bundled", [True, False])
def test_pruned_runs_on_the_kernels_and_simulated_agree(run, model, bundled):
    """The bundled model, which knows no such task and ends its answers at once, and a random one, which talks."""
    pytest.importorskip("mustafar")
    names, model = ("fwe", "niah_multikey_2"), DEMO if bundled else model
    for backend in ("kernel", "simulate"):
        options = ("--tasks", *names, "--lengths", "500", "--rows", "1", "--backend", backend)
        status, _, err = run("0.7", "0.7", "mustafar", *options, model=model)
        assert status == 0, err
    start = f"{model.name}_K_0.7_V_0.7_group32"
    for name in names:
        files = (run.out / folder / f"{name}_500.jsonl" for folder in (start, start + "_simulate"))
        kernel, simulated = map(read_jsonl, files)
        for record in kernel:
            held, dense = record.pop("_kv_bytes")  # a simulated cache has no size to speak of
            assert 0 < held < dense
        assert kernel == simulated and (bundled or kernel[0]["pred"])


def test_folders_are_named_by_what_makes_other_rows(run, tmp_path):
    (tmp_path / "essays.txt").write_text("Some words of an essay. And more of them. " * 20)
    options = ("--tasks", "niah_single_2", "--lengths", "400", "--rows", "1")
    for more in ((), ("--seed", "7"), ("--essays", str(tmp_path / "essays.txt"))):
        assert run("0", "0", "dense", *options, *more)[0] == 0
    assert sorted(path.name for path in run.out.iterdir()) == [DENSE, DENSE + "_essays", DENSE + "_seed7"]
    (tmp_path / "essays.txt").write_text("Another essay. " * 20)
    status, _, err = run("0", "0", "dense", *options, "--essays", str(tmp_path / "essays.txt"))
    assert status == 2 and "another configuration" in err and "niah_single_2_400.sha256" in err
    config = json.loads((run.out / DENSE / "config.json").read_text())
    (run.out / DENSE / "config.json").write_text(json.dumps(config | {"seed": 3}))
    status, _, err = run("0", "0", "dense", *options)
    assert status == 2 and "seed: there 3, now 42" in err and "choose another --output_dir" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "1k"), "--lengths 1024: tiny takes 512 tokens"),
        ((), "tiny takes 512 tokens, less than RULER's shortest length of 4096; give --lengths up to 512"),
        (("--tasks", "niah_single_9"), "unknown RULER task 'niah_single_9'; valid ones: niah_single_1"),
        (("--tasks", "qa_2", "--lengths", "512"), "no hotpotqa.json or hotpot_dev_distractor_v1.json in"),
        (("--tasks", "vt", "--lengths", "300"), "vt_300, row 0: needs"),
        (("--lengths", "4q"), "must be a number of tokens such as 4096 or 4k, got '4q'"),
        (("--essays", "no such file", "--lengths", "512"), "--essays no such file: No such file"),
        (("--data_dir", "no such folder"), "--data_dir no such folder is not a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(run, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    options = ("--tasks", "synthetic", *options) if "--tasks" not in options else options
    options = ("--data_dir", str(tmp_path / "empty"), *options)
    status, _, err = run("0", "0", "dense", *options)
    assert status == 2 and message in err and not run.out.exists()


def test_more_rows_than_questions_are_refused(run, tmp_path):
    paragraph = {"context": "It is red.", "qas": [{"question": "What?", "answers": [{"text": "red"}]}]}
    write_jsonl(tmp_path / "squad.json", [{"data": [{"paragraphs": [paragraph]}]}])
    options = ("--tasks", "qa_1", "--lengths", "200", "--data_dir", str(tmp_path), "--rows")
    assert "has 1 questions; choose at most as many" in run("0", "0", "dense", *options, "2")[2]
    assert run("0", "0", "dense", *options, "1")[0] == 0


def test_string_match():
    assert scoring.string_match_all("The numbers are 12 and 34.", ["12", "99", "34", "56"]) == 0.5
    assert scoring.string_match_all("ABCDE, fghij", ["abcde", "FGHIJ"]) == 1
    assert scoring.string_match_part("it is Paris", ["London", "paris"]) == 1
    assert scoring.string_match_part("it is Rome", ["London", "paris"]) == 0
    assert scoring.clean(" a\tb\x00c \n") == "a\nb\nc"
    assert scoring.percent([1, 0, 0]) == 33.33


def test_scores_of_a_folder(tmp_path, capsys):
    folder = tmp_path / "pred_ruler/run"
    write_jsonl(folder / "vt_4096.jsonl", [{"pred": "AB CD", "answers": ["AB", "CD", "EF", "GH"]}])
    write_jsonl(folder / "vt_8192.jsonl", [{"pred": "", "answers": ["AB"]}])
    write_jsonl(
        folder / "qa_1_8192.jsonl", [{"pred": "x", "answers": ["X", "y"]}, {"pred": "z", "answers": ["X"]}]
    )
    assert evaluate.main(["--model", "run", "--output_dir", str(tmp_path)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result == {"vt_4096": 50.0, "vt_8192": 0.0, "qa_1_8192": 50.0}
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["vt"] == ["string_match_all", "50.00", "0.00"]
    assert lines["qa_1"] == ["string_match_part", "-", "50.00"]
    assert lines["average"] == ["50.00", "25.00"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no predictions"),
        ({"vt": []}, "vt is not <task>_<length>.jsonl; tasks are niah_single_1"),
        ({"vt_512": [{"pred": "x"}]}, "vt_512.jsonl, line 1: missing answers"),
        ({"vt_512": [{"pred": "x", "answers": []}]}, "line 1: pred must be a string, answers some strings"),
        ({"config": None}, "is a run of longbench: score it with eval_long_bench.py"),
    ],
)
def test_what_cannot_be_scored(tmp_path, capsys, files, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, rows in files.items():
        if rows is None:
            write_jsonl(folder / "config.json", [{"benchmark": "longbench"}])
        else:
            write_jsonl(folder / f"{name}.jsonl", rows)
    assert evaluate.main(["--model", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_metrics_are_the_benchmarks():
    parts = {name for name, task in TASKS.items() if task.metric == "string_match_part"}
    assert parts == {"qa_1", "qa_2"} and {task.metric for task in TASKS.values()} == set(scoring.METRICS)
