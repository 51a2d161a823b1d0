"""summarize.py: the table it prints, the plot it draws, the folders it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import summarize

CONFIG = {
    "model": "some/model", "mode": "mustafar", "k_sparsity": 0.7, "v_sparsity": 0.5, "k_rule": "Kt_Mag",
    "v_rule": "Vt_Mag", "backend": "kernel", "residual_length": 32,
    "datasets": {"trec": {"expected": 20}, "qasper": {"expected": 10}},
}  # fmt: skip


def run_folder(path: Path, scores: dict, **config: object) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "result.json").write_text(json.dumps(scores))
    return str(path)


def test_table_and_plot(tmp_path, capsys):
    dense = run_folder(tmp_path / "a", {"trec": 80.0, "qasper": 30.5, "lcc": 1.0}, mode="dense")
    pruned = run_folder(tmp_path / "b", {"trec": 70.0, "qasper": 30.0}, backend="simulate")
    picture = tmp_path / "plots" / "bars.png"
    assert summarize.main([dense, pruned, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    assert rows[0] == ["data set", "rows", "dense", "K 0.7 V 0.5 simulate"]
    assert rows[2:] == [
        ["trec", "20", "80.00", "70.00"], ["qasper", "10", "30.50", "30.00"], ["average", "", "55.25", "50.00"],
    ]  # fmt: skip
    assert "left out, not in every run: lcc" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_refusals(tmp_path, capsys):
    one = run_folder(tmp_path / "a", {"trec": 80.0})
    other = run_folder(tmp_path / "b", {"trec": 80.0}, model="another")
    by_length = run_folder(tmp_path / "c", {"trec": {"0-4k": 1.0}})
    disjoint = run_folder(tmp_path / "d", {"lcc": 80.0})
    for folders, message in (
        ([one, other], "different models"),
        ([one, by_length], "--e"),
        ([one, disjoint], "no data set in common"),
        ([str(tmp_path / "none")], "long_test.sh"),
    ):
        assert summarize.main(folders) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[1"])
def test_damaged_result(tmp_path, capsys, text):
    folder = run_folder(tmp_path / "a", {})
    (Path(folder) / "result.json").write_text(text)
    assert summarize.main([folder]) == 2
    assert "not valid JSON" in capsys.readouterr().err
