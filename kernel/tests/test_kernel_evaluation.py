"""kernel_evaluation.py at small shapes: what it prints, writes and refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from mustafar import CompressedTensor, ops
from safetensors.torch import load_file

SMALL = ["--device", "cpu", "--kv_heads", "2", "--q_heads", "4", "--tokens", "100"]


@pytest.fixture(scope="module")
def evaluation():
    path = Path(__file__).parents[1] / "kernel_evaluation.py"
    spec = importlib.util.spec_from_file_location("kernel_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def time_once(evaluation, monkeypatch):
    """Run each call, but do not spend half a second on its median."""

    def once(call, device):
        call()
        return 1.0

    monkeypatch.setattr(evaluation, "median_ms", once)


def test_report(evaluation, tmp_path, capsys):
    report, saved = tmp_path / "report.json", tmp_path / "cache.safetensors"
    assert evaluation.main([*SMALL, "--json", str(report), "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Are results equal? True") == 2
    figures = json.loads(report.read_text())
    half, seventy = figures["results"]
    assert (half["sparsity"], seventy["sparsity"]) == (0.5, 0.7)
    # 100 tokens occupy two slices of 64: 16 bytes of bitmap and 64 or 40 slots of 2 bytes a row.
    assert half["bytes"]["k"] == 2 * 128 * (16 + 128) and seventy["bytes"]["v"] == 2 * 128 * (16 + 80)
    assert figures["arguments"]["tokens"] == 100 and figures["torch"] == torch.__version__
    state = load_file(saved)
    keys = CompressedTensor.from_state_dict({n[2:]: t for n, t in state.items() if n.startswith("k.")})
    assert keys.shape == (1, 2, 100, 128)


def test_a_wrong_op_is_reported(evaluation, monkeypatch, capsys):
    right = ops.key_scores
    monkeypatch.setattr(evaluation.ops, "key_scores", lambda q, c: right(q, c) * 1.01)
    assert evaluation.main([*SMALL, "--sparsity", "0.5"]) == 1
    printed = capsys.readouterr().out
    assert "Are results equal? False" in printed and "key_scores: error" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "[0, 1)"),
        (["--k_rule", "nonsense"], "valid: Kt_Mag"),
        (["--v_rule", "Kt_Mag"], "valid: Vt_Mag"),
        (["--k_rule", "ThinK"], "--k_rule ThinK scores by recent queries"),
        (["--q_heads", "5"], "multiple of --kv_heads"),
        (["--tokens", "0"], "at least 1"),
    ],
)
def test_bad_arguments(evaluation, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*SMALL, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
