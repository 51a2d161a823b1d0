"""Runs of several processes: the rows of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from benchmarks.longbench import evaluate, predict
from benchmarks.ruler import predict as ruler_predict
from benchmarks.shared import shards, store
from benchmarks.shared.errors import UserError
from benchmarks.shared.generation import Generator
from benchmarks.shared.shards import Shard
from benchmarks.sweep import command as sweep
from longbench_helpers import ACCURACY_EVAL, make_model, make_rows, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {"prompt": "{context} {input}", "max_new_tokens": 4, "metric": "qa_f1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "one.jsonl", make_rows(7, words=60))
    write_jsonl(folder / "two.jsonl", make_rows(2, seed=1))
    (folder / "tasks.json").write_text(json.dumps({"one": TASK, "two": TASK}))
    return folder


@pytest.fixture
def run(model, data, tmp_path, capsys, monkeypatch):
    """Run one process of several: run(rank, world, out="out", batch="2") -> (status, stdout, stderr)."""

    def predict_as(rank, world, *options, out="out", batch="2"):
        environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        fixed = ["0.5", "0.5", str(model), "mustafar", "--residual_length", "8", "--batch_size", batch]
        fixed += ["--data_dir", str(data), "--output_dir", str(tmp_path / out), "--device", "cpu"]
        status = predict.main([*fixed, *options])
        printed = capsys.readouterr()
        for name in environment:
            monkeypatch.delenv(name)
        return status, printed.out, printed.err

    return predict_as


def contents(folder) -> dict[str, bytes]:
    """Everything that a run leaves but its config, locks apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "config.json"}


@pytest.fixture
def whole(run, tmp_path):
    assert run(0, 1, out="whole")[0] == 0
    found = contents(tmp_path / "whole")
    assert len(found) == 2 and sum(text.count(b"\n") for text in found.values()) == 9
    return found


@pytest.mark.parametrize("world", [2, 3, 7])
def test_files_are_those_of_one_process(run, whole, tmp_path, world):
    """Also of an odd number of processes, and of more of them than there are batches."""
    for rank in reversed(range(world)):
        assert contents(tmp_path / "out") != whole
        status, printed, err = run(rank, world)
        assert status == 0, err
        assert ("predictions go to" in printed) == ("score with" in printed) == (rank == 0)
        assert ("the others have rows of" in printed) == (rank > 0)
    assert contents(tmp_path / "out") == whole
    assert not list((tmp_path / "out").rglob(".lock.*of*")) and not list((tmp_path / "out").rglob("*.tmp"))


def test_rows_are_dealt_by_batches():
    rows = {rank: [i for i in range(7) if Shard(rank, 3).takes(i, 2)] for rank in range(3)}
    assert rows == {0: [0, 1, 6], 1: [2, 3], 2: [4, 5]}
    assert [i for i in range(7) if Shard(1, 3).takes(i, 1)] == [1, 4]


def test_a_process_that_dies_holds_up_no_other(run, whole, tmp_path, monkeypatch, capsys):
    predict_rows, calls = Generator.predict, []

    def killed(self, task, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_rows(self, task, rows)

    monkeypatch.setattr(Generator, "predict", killed)
    assert run(0, 2)[0] == 130
    monkeypatch.setattr(Generator, "predict", predict_rows)
    folder = next((tmp_path / "out/pred").iterdir())
    with (folder / "parts/one/0of2.jsonl").open("ab") as file:
        file.write(b'{"pred": "w1')  # the kill came in the middle of a write
    status, printed, _ = run(1, 2)
    assert status == 0 and "the others have rows of one, two left" in printed
    assert not (folder / "one.jsonl").exists()
    assert evaluate.main(["--model", str(folder)]) == 2
    assert "several processes" in capsys.readouterr().err

    before = contents(tmp_path / "out")
    asked = []
    monkeypatch.setattr(
        Generator, "predict", lambda self, *a: asked.append(len(a[1])) or predict_rows(self, *a)
    )
    # The same command makes what is missing, and so does one with another number of processes.
    for world in (2, 3, 1):
        for name, content in before.items():
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).write_bytes(content)
        for path in folder.glob("*.jsonl"):
            path.unlink()
        asked.clear()
        for rank in range(world):
            assert run(rank, world)[0] == 0
        assert contents(tmp_path / "out") == whole and sum(asked) == 4  # of 9 rows


def test_two_of_one_rank_and_single_processes_are_kept_apart(tmp_path):
    first = store.RunFolder(tmp_path / "run", {}, Shard(0, 2))
    second = store.RunFolder(tmp_path / "run", {}, Shard(1, 2))
    for other in (Shard(0, 2), Shard()):
        with pytest.raises(UserError, match="another run is writing"):
            store.RunFolder(tmp_path / "run", {}, other)
    first.close()
    second.close()
    store.RunFolder(tmp_path / "run", {}).close()


@pytest.mark.parametrize(
    ("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0"), ("0", "many"), (None, "2")]
)
def test_a_wrong_environment(monkeypatch, rank, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(
        UserError, match="RANK must be from 0 to WORLD_SIZE - 1; start several processes with"
    ):
        shards.current()


def test_devices(monkeypatch):
    import torch

    assert Shard(1, 2, 1).device(None) is None and Shard(1, 2, 1).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Shard().device("cuda") == "cuda" and Shard().device("auto") == "auto"
    assert Shard(5, 8, 1).device(None) == Shard(5, 8, 1).device("cuda") == "cuda:1"
    assert Shard(5, 8, 1).device("cuda:0") == "cuda:0"
    with pytest.raises(UserError, match="no GPU of its own, there are 2; start as many"):
        Shard(2, 3, 2).device(None)
    with pytest.raises(UserError, match="--device auto spreads one model"):
        Shard(0, 2, 0).device("auto")


def test_ruler_and_sweeps(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.yaml").write_text(
        "benchmark: ruler\noptions: {tasks: [fwe], lengths: [400], rows: 3, device: cpu}\n"
        "rows: [{name: Dense}, {name: K0.5, k_sparsity: 0.5}]"
    )
    for name, processes in (("one", 1), ("two", 2)):
        for rank in range(processes):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            monkeypatch.setenv("RANK", str(rank))
            arguments = [
                str(tmp_path / "plan.yaml"),
                "--model",
                str(model),
                "--output_dir",
                str(tmp_path / name),
            ]
            assert sweep.main(arguments) == 0
            last = rank == processes - 1
            printed = capsys.readouterr().out
            assert ("report of tiny, RULER" in printed) == last
            assert ("the last process writes the report" in printed) != last
    one, two = (contents(tmp_path / name / ruler_predict.RUNS) for name in ("one", "two"))
    assert one == two and len(one) == 2
    table = "report/plan_tiny/table.md"
    assert (tmp_path / "one" / table).read_text() == (tmp_path / "two" / table).read_text()


def test_torchrun(run, whole, model, data, tmp_path):
    """Two real processes at the same time."""
    arguments = ["0.5", "0.5", str(model), "mustafar", "--residual_length", "8", "--batch_size", "2"]
    arguments += ["--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(ACCURACY_EVAL / "pred_long_bench.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
    assert done.stdout.count("predictions go to") == done.stdout.count("score with") == 1
