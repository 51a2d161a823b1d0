"""Prediction runs from the command line down: folders, configs, refusals, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from benchmarks.longbench import predict, settings
from benchmarks.longbench.tasks import Task
from benchmarks.shared import generation, models, options, store
from benchmarks.shared.errors import UserError
from longbench_helpers import ACCURACY_EVAL, make_model, make_rows, make_tokenizer, read_jsonl, write_jsonl

TASK = {"prompt": "{context} {input}", "max_new_tokens": 4, "metric": "qa_f1", "chat": True}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "rows"
    write_jsonl(folder / "mine.jsonl", make_rows(6))
    (folder / "tasks.json").write_text(json.dumps({"mine": TASK}))
    return folder


@pytest.fixture
def run(model, data_dir, tmp_path, capsys):
    """Run a prediction in this process: run("0", "0", "dense", ...) -> (status, stdout, stderr)."""

    def predict_with(k, v, mode, *options, model=model):
        fixed = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        try:
            status = predict.main([k, v, str(model), mode, *fixed, *options])
        except SystemExit as stop:  # argparse's way out
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    predict_with.out = tmp_path / "out"
    return predict_with


def folders(run, kind="pred"):
    return sorted(path.name for path in (run.out / kind).iterdir())


DENSE = "tiny_512_K_0.0_V_0.0_group32_dense"


def test_a_dense_run(run, model, data_dir):
    status, out, err = run("0", "0", "dense")
    assert status == 0, err
    assert folders(run) == [DENSE] and f"--model {DENSE}" in out
    records = read_jsonl(run.out / "pred" / DENSE / "mine.jsonl")
    rows = make_rows(6)
    assert [record["_index"] for record in records] == list(range(6))
    for record, row in zip(records, rows, strict=True):
        assert list(record) == ["pred", "answers", "all_classes", "length", "dataset", "_index"]
        assert record["dataset"] == "mine" and record["pred"]
        assert all(record[key] == row[key] for key in ("answers", "all_classes", "length"))
    config = json.loads((run.out / "pred" / DENSE / "config.json").read_text())
    assert config["model"] == str(model) and config["mode"] == "dense" and config["max_length"] == 512
    assert (config["dtype"], config["chat_template"], config["k_rule"]) == ("float32", "none", None)
    assert config["datasets"]["mine"]["task"] | TASK == config["datasets"]["mine"]["task"]
    assert config["environment"]["torch"]


def test_the_environment_is_that_of_the_run_that_predicted(run, monkeypatch):
    found = {}

    def predict(gpu, date, *arguments):
        now = {"date": date, "torch": "2", "gpu": gpu}
        monkeypatch.setattr("benchmarks.shared.run.environment", lambda: now)
        assert run("0", "0", "dense", *arguments)[0] == 0
        found.update(json.loads((run.out / "pred" / DENSE / "config.json").read_text())["environment"])
        return now

    first = predict("one", "1", "--limit", "2")
    assert found == first
    predict("another", "2", "--limit", "2")  # every row is there
    assert found == first
    predict("one", "3", "--limit", "4")  # rows more, the same GPU
    assert found == first
    last = predict("another", "4")
    assert found == last | {"earlier": [first]}


def test_predictions_are_greedy_ones_of_the_model(run, model):
    import torch
    from transformers import AutoModelForCausalLM

    run("0", "0", "dense", "--limit", "2", "--max_length", "10")
    predicted = read_jsonl(run.out / "pred" / DENSE.replace("512", "10") / "mine.jsonl")
    tokenizer, network = make_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    for record, row in zip(predicted, make_rows(2), strict=True):
        words = f"{row['context']} {row['input']}".split()  # with <s>: 5 tokens of each end
        ids = tokenizer(" ".join(words[:4]) + " ".join(words[-5:]))["input_ids"]
        start = len(ids)
        for _ in range(TASK["max_new_tokens"]):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert record["pred"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_batches_give_the_rows_their_own_predictions(run):
    run("0", "0", "dense")
    status, _, err = run("0", "0", "dense", "--batch_size", "4")
    assert status == 0, err
    one, four = (read_jsonl(run.out / "pred" / name / "mine.jsonl") for name in (DENSE, DENSE + "_batch4"))
    assert one == four


def test_the_folders_name_says_what_is_not_the_default(model):
    def name(*arguments):
        args = settings.parser().parse_args(["0.5", "0.70", "x", *arguments])
        run = options.Settings(
            benchmark="", model="", model_fingerprint=None, max_length=8192, mode=args.mode,
            k_sparsity=args.k_sparsity, v_sparsity=args.v_sparsity, group_size=args.group_size, k_rule="",
            v_rule="", residual_length=0, backend="", chat_template="", dtype="", device="", batch_size=1,
        )  # fmt: skip
        return options.folder_name(run, args, "Llama")

    start = "Llama_8192_K_0.5_V_0.7_group32"
    assert name("mustafar") == start
    assert name("dense") == start + "_dense"
    assert name("mustafar", "--k_rule", "ThinK") == start + "_ThinK_Vt_Mag"
    assert name("mustafar", "--backend", "simulate") == start + "_simulate"
    assert name("mustafar", "--residual_length", "64") == start + "_residual64"
    assert name("mustafar", "--chat_template", "model") == start + "_chat-model"
    assert name("mustafar", "--dtype", "bfloat16") == start + "_bfloat16"
    assert name("mustafar", "--group_size", "64") == start.replace("32", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1", "0", "mustafar"), "k_sparsity: must be the fraction of zeros, in [0, 1), got '1'"),
        (("0", "-0.1", "mustafar"), "v_sparsity: must be the fraction of zeros"),
        (("nan", "0", "mustafar"), "got 'nan'"),
        (("0", "half", "mustafar"), "got 'half'"),
        (("0", "0", "sparse"), "invalid choice: 'sparse' (choose from"),
        (("0.5", "0", "dense"), "mode dense prunes nothing"),
        (("0", "0", "dense", "--backend", "gpu"), "invalid choice: 'gpu' (choose from"),
        (("0", "0", "dense", "--datasets", "trec,nq"), "unknown data set 'nq'; valid ones: narrativeqa,"),
        (("0", "0", "dense", "--datasets", "trec"), "no trec.jsonl in"),
        (("0", "0", "dense", "--limit", "0"), "at least 1"),
        (("0", "0", "dense", "--device", "tpu9"), "--device tpu9"),
        (("0", "0", "dense", "--data_dir", "/nowhere"), "--data_dir /nowhere is not a folder"),
        (("0", "0", "mustafar-mistral"), "mode mustafar-mistral is not for tiny"),
        (("0", "0", "mustafar", "--k_rule", "Kt_Magic"), "unknown k_rule 'Kt_Magic'; valid: "),
    ],
)
def test_bad_input_is_a_message_and_status_2(run, arguments, message):
    if arguments[2].startswith("mustafar") and "sparse" not in message and "fraction" not in message:
        pytest.importorskip("mustafar.pruning")
    status, _, err = run(*arguments)
    assert status == 2 and message in err and "Traceback" not in err
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere", "no such folder: /nowhere"),
        ("a/b/c", "no such folder: a/b/c"),
        (".", "has no config.json"),
    ],
)
def test_a_model_that_is_not_there(run, name, message, monkeypatch):
    """Said before the data is asked for, which may have to be downloaded."""
    monkeypatch.setattr(predict.data, "load_rows", None)
    status, _, err = run("0", "0", "dense", model=name)
    assert status == 2 and message in err


def test_the_wrapper_takes_python_from_the_environment(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift\necho "called with: $*"\n')
    python.chmod(0o755)
    script = ["bash", str(ACCURACY_EVAL / "long_test.sh"), "0.5", "0.7", "a model", "mustafar", "--e"]
    done = subprocess.run(script, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.stdout == "called with: 0.5 0.7 a model mustafar --e\n"
    script[2:] = []
    done = subprocess.run(script, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: bash long_test.sh k_sparsity v_sparsity model mode" in done.stderr


def test_a_malformed_line_stops_before_anything_is_written(run, data_dir):
    with (data_dir / "mine.jsonl").open("a") as file:
        file.write('{"input": \n')
    status, _, err = run("0", "0", "dense")
    assert status == 2 and "mine.jsonl, line 7: not valid JSON" in err
    assert not run.out.exists()


def test_an_interrupted_run_is_resumed(run):
    run("0", "0", "dense")
    path = run.out / "pred" / DENSE / "mine.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (lines[0] + lines[1][:20], lines[0], b"", lines[0][:-1], b"".join(lines[:5]) + b'{"pred'):
        path.write_bytes(left)
        status, _, err = run("0", "0", "dense")
        assert status == 0, err
        assert path.read_bytes() == whole
    path.write_bytes(b"".join(lines[:2] + lines[3:]))  # a row lost from the middle is made again, at the end
    run("0", "0", "dense")
    assert path.read_bytes() == b"".join(lines[:2] + lines[3:] + lines[2:3])


def test_a_finished_run_loads_no_model(run, monkeypatch):
    run("0", "0", "dense", "--limit", "2")
    monkeypatch.setattr(models, "load_model", None)
    status, _, _ = run("0", "0", "dense", "--limit", "2")
    assert status == 0


def test_a_limit_can_be_raised(run):
    path = run.out / "pred" / DENSE / "mine.jsonl"
    for limit, rows in (("2", 2), ("5", 5), ("3", 5)):
        assert run("0", "0", "dense", "--limit", limit)[0] == 0
        assert len(read_jsonl(path)) == rows
        config = json.loads((path.parent / "config.json").read_text())
        assert (config["datasets"]["mine"]["expected"], config["datasets"]["mine"]["rows"]) == (rows, 6)


def test_another_configuration_is_refused(run, model, data_dir, tmp_path):
    run("0", "0", "dense", "--limit", "1")
    folder = run.out / "pred" / DENSE
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    config = json.loads(before["config.json"])
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16", "batch_size": 3}))
    status, _, err = run("0", "0", "dense")
    assert (
        status == 2 and "dtype: there 'float16', now 'float32'" in err and "batch_size: there 3, now 1" in err
    )
    assert "max_length" not in err and "remove that folder, or choose another --output_dir" in err
    (folder / "config.json").write_bytes(before["config.json"])

    other = make_model(tmp_path / "tiny", seed=1)  # same name, other weights
    status, _, err = run("0", "0", "dense", model=other)
    assert status == 2 and "model_fingerprint: there" in err

    write_jsonl(data_dir / "mine.jsonl", make_rows(6, seed=1))
    status, _, err = run("0", "0", "dense")
    assert status == 2 and "mine.sha256: there" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    (folder / "config.json").unlink()
    status, _, err = run("0", "0", "dense")
    assert status == 2 and "holds predictions but no config.json" in err


def test_a_retrained_model_in_the_same_folder_is_another_model(tmp_path):
    first = models.inspect_model(str(make_model(tmp_path / "m", layers=1))).fingerprint
    assert models.inspect_model(str(tmp_path / "m")).fingerprint == first
    make_model(tmp_path / "m", layers=1, seed=1)
    assert models.inspect_model(str(tmp_path / "m")).fingerprint != first


def test_longbench_e_goes_to_its_own_folder(run, data_dir):
    write_jsonl(data_dir / "mine_e.jsonl", make_rows(1))
    assert run("0", "0", "dense", "--e")[0] == 0
    assert folders(run, "pred_e") == [DENSE] and not (run.out / "pred").exists()


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")  # root may write anywhere, but a file is no folder even to root
    with pytest.raises(UserError, match=r"cannot write to .*--output_dir"):
        store.RunFolder(tmp_path / "file" / "run", {"mode": "dense"})


def test_two_runs_may_not_write_to_one_folder(tmp_path):
    folder = store.RunFolder(tmp_path / "run", {"mode": "dense"})
    with pytest.raises(UserError, match="another run is writing"):
        store.RunFolder(tmp_path / "run", {"mode": "dense"})
    folder.close()
    store.RunFolder(tmp_path / "run", {"mode": "dense"}).close()


def test_a_prediction_file_that_is_not_ours_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, message in (
        ('{"pred": "a"}\n', "line 1: not a prediction"),
        ('{"_index": 0}\n{"_index": 0}\n', "line 2: row 0 is there twice"),
        ('{"_index": 0}\n\n', "line 2: not a prediction"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            store.PredictionFile(path)


def test_any_text_survives_the_prediction_file(tmp_path):
    answers = ["one\u2028two\nthree", "段落27", "\ud83d", '"\\\x00']
    file = store.PredictionFile(tmp_path / "x.jsonl")
    for index, answer in enumerate(answers):
        file.append({"pred": answer, "_index": index})
    file.close()
    assert [record["pred"] for record in read_jsonl(tmp_path / "x.jsonl")] == answers
    assert store.PredictionFile(tmp_path / "x.jsonl").done == {0, 1, 2, 3}


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    file = store.PredictionFile(tmp_path / "x.jsonl")
    file.append({"pred": "first", "_index": 0})
    write = os.write

    def write_some(descriptor, line):
        if len(line) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, line[:10])

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(UserError, match="No space left"):
        file.append({"pred": "second", "_index": 1})
    assert [record["pred"] for record in read_jsonl(tmp_path / "x.jsonl")] == ["first"]


def test_kill_and_resume_loses_and_doubles_nothing(run, model, data_dir, tmp_path):
    write_jsonl(data_dir / "mine.jsonl", make_rows(50))
    (data_dir / "tasks.json").write_text(json.dumps({"mine": TASK | {"max_new_tokens": 8}}))
    assert run("0", "0", "dense")[0] == 0
    whole = (run.out / "pred" / DENSE / "mine.jsonl").read_bytes()

    command = [sys.executable, str(ACCURACY_EVAL / "pred_long_bench.py"), "0", "0", str(model), "dense"]
    command += ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "killed"), "--device", "cpu"]
    path = tmp_path / "killed/pred" / DENSE / "mine.jsonl"
    seen = 0
    for least in (1, 8):
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= seen + least:
                break
            time.sleep(0.005)
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = path.read_bytes().count(b"\n")
        assert 0 < seen < 50
    with path.open("ab") as file:  # as if the last kill had come in the middle of a write
        file.write(whole[:15])
    arguments = [*command[2:], "--limit", "50"]
    assert predict.main(arguments) == 0
    assert path.read_bytes() == whole


class Recorder:
    """Stands for a model; keeps what generate is called with and answers with the token 7."""

    def __init__(self):
        import torch
        from transformers import GenerationConfig

        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig(
            do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 3], repetition_penalty=1.1
        )

    def generate(self, **options):
        import torch

        self.options = options
        return torch.cat([options["input_ids"], torch.full_like(options["input_ids"][:, :1], 7)], dim=1)


def predictor(recorder):
    return generation.Generator(models.LoadedModel(recorder, make_tokenizer(), None))


def test_generation_is_greedy_whatever_the_checkpoint_asks_for():
    recorder = Recorder()
    answers = predictor(recorder).predict(Task("x", "{context}", 9, "qa_f1"), [{"ids": [1, 8, 9]}])
    assert answers == ["w0"]
    generation_config = recorder.generation_config
    assert generation_config.do_sample is False and generation_config.temperature is None
    assert generation_config.repetition_penalty == 1.1  # the official code leaves the rest alone, too
    assert recorder.options["input_ids"].tolist() == [[1, 8, 9]]
    assert recorder.options["max_new_tokens"] == 9 and recorder.options["eos_token_id"] == [2, 3]
    assert "min_length" not in recorder.options


def test_samsum_makes_a_token_and_then_stops_at_a_newline():
    recorder = Recorder()
    task = Task("samsum", "{context}", 9, "rouge", stop_at_newline=True)
    predictor(recorder).predict(task, [{"ids": [1, 8, 9]}])
    newline = make_tokenizer().encode("\n", add_special_tokens=False)[-1]
    assert recorder.options["eos_token_id"] == [2, newline] and recorder.options["min_length"] == 4


def test_batches_are_padded_on_the_left():
    recorder = Recorder()
    predictor(recorder).predict(Task("x", "{context}", 9, "qa_f1"), [{"ids": [1, 8]}, {"ids": [1, 8, 9]}])
    assert recorder.options["input_ids"].tolist() == [[0, 1, 8], [1, 8, 9]]
    assert recorder.options["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_an_answer_is_cut_at_its_end_token():
    assert generation._up_to_end([5, 6, 2, 0, 0], [2, 3]) == [5, 6, 2]
    assert generation._up_to_end([5, 6], [2]) == [5, 6]


@pytest.mark.parametrize(
    ("stored", "device", "given", "expected"),
    [
        ("bfloat16", "cuda", None, "bfloat16"),
        ("float16", "cuda:1", None, "float16"),
        ("float32", "cuda", None, "float16"),
        (None, "cuda", None, "float16"),
        ("bfloat16", "cpu", None, "float32"),
        ("bfloat16", "cpu", "float16", "float16"),
    ],
)
def test_dtypes(stored, device, given, expected):
    class Config:
        dtype = stored

    info = models.ModelInfo("x", "x", Config, None, None)
    assert models.resolve_dtype(info, given, device) == expected
