"""Prediction runs on the pruned cache: the two patched models, and any other through the generic path."""

from __future__ import annotations

import json

import pytest
from benchmarks.longbench import predict
from longbench_helpers import make_model, make_rows, read_jsonl, write_jsonl

pytest.importorskip("mustafar")
pytest.importorskip("model.llama")
pytest.importorskip("model.mistral")

TASK = {"prompt": "{context} {input}", "max_new_tokens": 8, "metric": "qa_f1"}
MODES = {"llama": "mustafar", "mistral": "mustafar-mistral", "qwen3": "mustafar"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODES)
def answers(request, tmp_path_factory):
    """answers(k, v, mode, *options) -> the predictions of a run of one kind of model."""
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(root / "tiny", request.param)
    write_jsonl(root / "rows/mine.jsonl", make_rows(6, words=150))
    (root / "rows/tasks.json").write_text(json.dumps({"mine": TASK}))

    def run(k, v, mode, *options):
        fixed = ["--data_dir", str(root / "rows"), "--output_dir", str(root), "--device", "cpu"]
        assert predict.main([k, v, str(model), mode, *fixed, *options]) == 0
        newest = max((root / "pred").iterdir(), key=lambda path: (path / "config.json").stat().st_mtime_ns)
        return [record["pred"] for record in read_jsonl(newest / "mine.jsonl")]

    run.mode = MODES[request.param]
    return run


def test_without_sparsity_the_answers_are_the_dense_ones(answers):
    assert answers("0", "0", answers.mode) == answers("0", "0", "dense")


def test_the_kernels_answer_as_the_simulation_does(answers):
    pruned = answers("0.7", "0.7", answers.mode)
    assert pruned == answers("0.7", "0.7", answers.mode, "--backend", "simulate")
    assert pruned != answers("0", "0", "dense")  # so it was pruned
    assert pruned == answers("0.7", "0.7", answers.mode, "--batch_size", "3")


def test_the_residual_window_matters(answers):
    everything = answers("0.9", "0.9", answers.mode, "--residual_length", "256")
    assert everything == answers("0", "0", "dense")
    assert everything != answers("0.9", "0.9", answers.mode)


def test_a_model_is_told_its_right_mode(tmp_path, capsys):
    model = make_model(tmp_path / "tiny", "mistral")
    write_jsonl(tmp_path / "trec.jsonl", make_rows(1))
    arguments = ["0.5", "0.5", str(model), "mustafar", "--data_dir", str(tmp_path)]
    assert predict.main([*arguments, "--output_dir", str(tmp_path)]) == 2
    assert "use mode mustafar-mistral" in capsys.readouterr().err


def test_a_model_the_cache_cannot_serve_is_refused(tmp_path, capsys):
    model = make_model(tmp_path / "tiny", "gemma2")  # it soft-caps its scores
    write_jsonl(tmp_path / "trec.jsonl", make_rows(1))
    arguments = ["0.5", "0.5", str(model), "mustafar", "--data_dir", str(tmp_path)]
    assert predict.main([*arguments, "--output_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "cannot load tiny in mode mustafar" in err and "Traceback" not in err
