"""`backend="auto"`: the table of crossovers, its command, and a cache that decides by it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from mustafar import crossover
from mustafar.history import DenseHistory, PackedHistory
from tiny_models import cache_for, generate, one_thread, prompts, tiny

__all__ = ["one_thread"]

GPU = "NVIDIA Test"
RUN = {"gpu": GPU, "date": "2026-01-02", "commit": "abc", "torch": "2.13", "cuda": "13.0", "driver": "1"}


def _measured(batch: int, tokens: int, relation: str, sparsity: float, **other: object) -> dict:
    shape = {"q_heads": 32, "kv_heads": 8, "batch": batch, "tokens": tokens, "head_dim": 128}
    shape |= {"window": 160, "dtype": "float16", "group": 4, "section": "context"}
    return shape | {"eager": {"relation": relation, "sparsity": sparsity}} | other


REPORT = {
    "runs": [RUN],
    "shapes": [
        _measured(8, 8192, "=", 0.99, dtype="bfloat16"),
        _measured(1, 4096, ">", 0.7),
        _measured(8, 8192, "=", 0.46),
        _measured(32, 8192, "<=", 0.3),
        _measured(8, 8192, "=", 0.6, q_heads=64),
        _measured(8, 8192, ">", 0.7, head_dim=64),
    ],
}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "crossovers.json"
    monkeypatch.setattr(crossover, "TABLE", path)
    monkeypatch.setattr(crossover, "_gpu_name", lambda device: GPU)
    crossover.write_table(path, crossover.merge([], REPORT))
    yield path
    crossover.read_table.cache_clear()


@pytest.mark.parametrize(
    "batch,heads,tokens,head_dim,sparsity,expected",
    [
        (8, (32, 8), 8192, 128, 0.5, "kernel"),
        (8, (32, 8), 8192, 128, 0.4, "simulate"),
        (1, (32, 8), 4096, 128, 0.9, "simulate"),  # not up to the highest measured
        (1, (32, 8), 100, 128, 0.7, "simulate"),  # smaller than any measured
        (64, (32, 8), 32768, 128, 0.3, "kernel"),  # larger
        (64, (32, 8), 32768, 128, 0.2, "simulate"),  # less than the lowest measured
        (1, (32, 8), 65536, 128, 0.5, "kernel"),  # as large as batch 8 of 8192
        (8, (64, 8), 8192, 128, 0.5, "simulate"),  # groups of 8
        (8, (56, 8), 8192, 128, 0.5, "simulate"),  # of 7: nearest to 8
        (8, (32, 8), 8192, 80, 0.6, "simulate"),  # head dim 80: nearest to 64
        (8, (32, 8), 0, 128, 0.5, "kernel"),
    ],
)
def test_nearest_shape_decides(table, batch, heads, tokens, head_dim, sparsity, expected) -> None:
    assert crossover.faster_backend("cuda", batch, *heads, tokens, head_dim, sparsity) == expected


def test_what_was_not_measured(table, monkeypatch) -> None:
    shape = (1, 32, 8, 4096, 128, 0.7)
    assert crossover.faster_backend("cpu", *shape) == "kernel"
    assert crossover.faster_backend(torch.device("cuda", 0), *shape) == "simulate"
    monkeypatch.setattr(crossover, "_gpu_name", lambda device: f"{GPU} NVL")
    assert crossover.faster_backend("cuda", *shape) == "kernel"


def test_the_package_s_table_is_valid() -> None:
    for entry in crossover.read_table(crossover.TABLE):
        assert entry["gpu"] and entry["shapes"] and entry["run"]["commit"]


def test_command(table, tmp_path, capsys) -> None:
    report, out = tmp_path / "report.json", tmp_path / "new.json"
    report.write_text(json.dumps(REPORT))
    assert crossover.main([str(report), "--table", str(out)]) == 0
    first = out.read_text()
    assert first == table.read_text() and f"{GPU}, 5 shapes" in capsys.readouterr().out
    (entry,) = json.loads(first)["gpus"]
    assert entry["run"] == {"date": "2026-01-02", "commit": "abc", "torch": "2.13", "cuda": "13.0"}
    other = copy.deepcopy(REPORT)
    other["runs"][0]["gpu"] = "NVIDIA Another"
    report.write_text(json.dumps(other))
    assert crossover.main([str(report), "--table", str(out)]) == 0
    other["shapes"] = other["shapes"][:2]
    report.write_text(json.dumps(other))
    assert crossover.main([str(report), "--table", str(out)]) == 0  # replaces its own entry only
    assert [len(entry["shapes"]) for entry in json.loads(out.read_text())["gpus"]] == [2, 5]


@pytest.mark.parametrize(
    "change,match",
    [
        ({"runs": [RUN, RUN | {"gpu": "NVIDIA Other"}]}, "2 devices"),
        ({"runs": [RUN | {"cuda": "none"}]}, "table is for GPUs"),
        ({"shapes": []}, "no attention shape"),
        ({"runs": None}, "TypeError"),
    ],
)
def test_unusable_reports(change: dict, match: str, tmp_path, capsys) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT | change))
    with pytest.raises(SystemExit) as ended:
        crossover.main([str(report), "--table", str(tmp_path / "new.json")])
    assert ended.value.code == 2 and match in capsys.readouterr().err and not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"gpus": [{"gpu": "x"}]}', '{"gpus": [{"gpu": 1, "shapes": []}]}']
)
def test_broken_tables(text: str, tmp_path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a table of crossovers"):
        crossover.read_table(path)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_cache_decides_once_and_gives_the_same_tokens(options: dict, monkeypatch) -> None:
    asked = []

    def faster(device, *shape):
        asked.append((torch.device(device).type, *shape))
        return "kernel" if shape[3] > 50 else "simulate"

    monkeypatch.setattr(crossover, "faster_backend", faster)
    model = tiny("llama")
    cache = cache_for(model, "auto", residual_length=8, flush_every=16)
    assert cache.backend == "auto" and model.config._attn_implementation == "mustafar"
    batch = options.get("num_beams", 1)
    for tokens, kind, history in ((80, "kernel", PackedHistory), (40, "simulate", DenseHistory)):
        ids = prompts(1, tokens)
        expected = generate(model, ids, cache_for(model, kind, residual_length=8, flush_every=16), **options)
        model.set_attn_implementation("mustafar")
        assert torch.equal(generate(model, ids, cache, **options), expected)
        assert cache.backend == kind
        assert all(type(h) is history for layer in cache.layers for h in layer.histories)
        cache.reset()
    assert asked == [("cpu", batch, 4, 2, tokens, 64, 0.6) for tokens in (80, 40)]


def test_general_layout_was_not_measured(monkeypatch) -> None:
    monkeypatch.setattr(crossover, "faster_backend", lambda *_: "simulate")
    model = tiny("llama")
    for rule, expected in (("Vt_Mag", "simulate"), ("Vc_Mag", "kernel")):
        cache = cache_for(model, "auto", v_rule=rule)
        generate(model, prompts(1, 60), cache, new=3)
        assert cache.backend == expected
