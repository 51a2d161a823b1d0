"""mem_spd_test.py on the tiny preset: rows, formulas, peers that decode what they should, and bad input."""

from __future__ import annotations

import contextlib
import csv
import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks.shared.errors import UserError
from benchmarks.speed import dense, measure, report
from benchmarks.speed.cli import main
from benchmarks.speed.modes import Shape, parse
from benchmarks.speed.presets import PRESETS, load
from benchmarks.speed.ranks import Ranks
from mustafar import CacheDoesNotFit, Decoder

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = "dense dense-static dense-flash mustafar-0.7 mustafar-dynamic-0.7 mustafar-compiled-0.7".split()


def test_a_run(tmp_path, capsys) -> None:
    arguments = (
        f"--model tiny --context 200 --batch 1 2 --quick --device cpu --out {tmp_path} --modes".split()
    )
    assert main([*arguments, *MODES]) == 0
    printed = capsys.readouterr().out
    assert "mustafar-0.7" in printed and "x dense-flash" in printed
    with (tmp_path / "mem_spd.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = {(row["mode"], row["batch"]) for row in rows if row["section"] == "steps"}
    assert steps == {(mode, batch) for mode in MODES for batch in "12"}
    assert [row["mode"] for row in rows if row["section"] == "generation"] == MODES
    assert all(float(row["ms_step"]) > 0 and row["commit"] and not row["note"] for row in rows)
    exact = [row for row in rows if row["section"] == "generation" and row["mode"] == "mustafar-0.7"]
    assert exact[0]["kv_bytes"] == exact[0]["kv_formula"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "throughput_batch.png",
        "throughput_new_tokens.png",
    }


def test_bandwidth_is_that_of_the_fastest_copies(monkeypatch) -> None:
    """Not those before clocks are up, however fast; not those that something else got in the way of."""
    seconds = iter([0.001, 0.2, 0.2, 0.02, 0.08, 0.01, 0.08, 0.02, 0.08, 0.02, 0.08])
    monkeypatch.setattr(measure, "seconds_of", lambda work, device: work() or next(seconds))
    found = measure.bandwidth(torch.device("cpu"))
    assert found == pytest.approx(2 * measure.COPIES * (1 << 26) / 0.01) and next(seconds, None) is None


def test_seconds_of(monkeypatch) -> None:
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.seconds_of(lambda: None, torch.device("cpu")) == 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_seconds_of_a_gpu_s_work() -> None:
    """By the GPU's clock: a thousand million cycles take no less than 0.1 s on any."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert 0.1 < measure.seconds_of(lambda: torch.cuda._sleep(1_000_000_000), device) < 60


def test_tables_of_several_runs_become_one(tmp_path, capsys, monkeypatch) -> None:
    base = "--model tiny --batch 1 --quick --device cpu --no_plots --sections steps --commit abc --modes"
    assert main([*base.split(), "dense-flash", "--context", "100", "150", "--out", str(tmp_path / "a")]) == 0
    assert main([*base.split(), "mustafar-0.7", "--context", "100", "--out", str(tmp_path / "b")]) == 0
    older = (tmp_path / "b" / "mem_spd.csv").read_text().replace("model,ranks,mode", "model,mode")
    (tmp_path / "b" / "mem_spd.csv").write_text(older.replace("tiny,1,", "tiny,"))
    capsys.readouterr()
    tables = [str(tmp_path / name / "mem_spd.csv") for name in "ab"]
    assert report.main([*tables, "--out", str(tmp_path / "all")]) == 0
    assert "x dense-flash" in capsys.readouterr().out and (tmp_path / "all" / "throughput_batch.png").exists()
    table = tmp_path / "all" / "mem_spd.csv"
    rows = report.read_csv(table)
    assert [(row["mode"], row["context"], row["ranks"], row["commit"]) for row in rows] == [
        ("dense-flash", 100, 1, "abc"),
        ("dense-flash", 150, 1, "abc"),
        ("mustafar-0.7", 100, 1, "abc"),
    ]
    report.write_csv([rows[0] | {"note": "a remark"}, *rows[1:]], table)
    drawn = []
    monkeypatch.setattr(report, "draw", lambda rows, folder: drawn.extend(rows) or [])
    capsys.readouterr()
    assert report.main([str(table), "--context", "100", "--out", str(tmp_path / "all")]) == 0
    assert [row["context"] for row in drawn] == [100, 100] and len(report.read_csv(table)) == 3
    assert "x dense-flash" in capsys.readouterr().out  # a note beside figures takes nothing away
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, said in (("other.csv", "not a table"), ("none.csv", "No such file")):
        with pytest.raises(SystemExit):
            report.main([str(tmp_path / name)])
        assert said in capsys.readouterr().err


def test_numbers_of_ranks_are_not_mixed(tmp_path, monkeypatch) -> None:
    row = {"section": "steps", "batch": 1, "context": 100, "tokens_per_s": 1.0}
    rows = [
        row | {"ranks": ranks, "mode": mode, "ms_step": ms}
        for ranks, mode, ms in (
            (2, "dense", 3.0),
            (1, "dense", 4.0),
            (1, "mustafar-0.7", 2.0),
            (2, "mustafar-0.7", 2.0),
        )
    ]
    assert report.comparison(rows).splitlines() == [
        "2 ranks, batch 1, 100 tokens: mustafar-0.7 2.000 ms: 1.50x dense",
        "batch 1, 100 tokens: mustafar-0.7 2.000 ms: 2.00x dense",
    ]
    drawn = []
    monkeypatch.setattr(report, "_lines", lambda rows, *_: drawn.extend(rows) or tmp_path)
    report.draw(rows, tmp_path)
    assert [row["ranks"] for row in drawn] == [2, 2]


def test_auto_says_what_it_chose(tmp_path) -> None:
    arguments = (
        "--model tiny --context 200 --batch 1 --quick --device cpu --no_plots --modes mustafar-auto-0.7"
    )
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = report.read_csv(tmp_path / "mem_spd.csv")
    assert [(row["section"], row["mode"]) for row in rows] == [
        ("steps", "mustafar-auto-0.7 (kernel)"),
        ("generation", "mustafar-auto-0.7 (kernel)"),
    ]
    assert rows[1]["kv_bytes"] == rows[1]["kv_formula"]
    auto = parse("mustafar-auto-0.7")
    dense = auto.settled(SimpleNamespace(backend="simulate"))
    assert (dense.name, dense.sparsity, dense.loop) == ("mustafar-auto-0.7 (simulate)", None, "decoder")


def test_json(tmp_path, capsys) -> None:
    arguments = "--model tiny --context 100 --batch 1 --quick --device cpu --no_plots --json --sections steps"
    assert main([*arguments.split(), "--modes", "mustafar-0.5", "--out", str(tmp_path)]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["mode"] == "mustafar-0.5" and row["tokens_per_s"] > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_dense_peers_give_the_same_tokens(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = load("tiny", "float32" if device == "cpu" else "float16", device)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.randint(1, 512, (2, 300), generator=torch.Generator().manual_seed(3))
    results = []
    for name in ("dense-static", "dense-flash", "mustafar-0"):
        cache = parse(name).make_cache(model, 400)
        results.append(Decoder(model, cache, 2, graph=False).generate(ids, max_new_tokens=60).new_tokens)
    same = 60 if device == "cpu" else 4  # half precision rounds otherwise in each of them
    assert torch.equal(results[0][:, :same], results[1][:, :same])
    assert torch.equal(results[0][:, :same], results[2][:, :same])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_step_of_one_length(device: str, monkeypatch) -> None:
    """It is exact where it fills its cache, and the same one again after that. On a CPU with torch's own SDPA."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if device == "cpu":
        monkeypatch.setattr(dense, "only_cudnn", contextlib.nullcontext)
    model = load("tiny", "float32" if device == "cpu" else "float16", device)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.randint(1, 512, (2, 300), generator=torch.Generator().manual_seed(3))
    expected = model.generate(
        ids.to(device), max_new_tokens=2, min_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    decoder = Decoder(model, parse("dense-cudnn").make_cache(model, 301), 2, eos_token_id=(), fuse=False)
    for _ in range(2):
        got = decoder.generate(ids, max_new_tokens=2)
        assert torch.equal(got.sequences, expected)
    decoder.prefill(ids)
    layer = decoder.cache.layers[0]
    for _ in range(3):
        decoder.step()
        assert decoder.cache.get_seq_length() == 300 and layer.keys.shape[2] == 301
        assert layer.keys[:, :, 300].abs().sum() > 0


def test_cudnn_steps_are_as_long_as_the_others(monkeypatch, tmp_path, capsys) -> None:
    """Its one length is the middle of theirs, and no text is decoded with it."""
    monkeypatch.setattr(dense, "only_cudnn", contextlib.nullcontext)
    monkeypatch.setattr(dense, "check_cudnn", lambda *_: None)
    filled = []
    fill = measure.fill
    monkeypatch.setattr(measure, "fill", lambda *args: filled.append(args[4]) or fill(*args))
    arguments = (
        f"--model tiny --context 200 --batch 1 --quick --device cpu --no_plots --out {tmp_path} --modes"
    )
    assert main([*arguments.split(), "dense-cudnn", "mustafar-0.7"]) == 0
    assert set(filled) == {200 + 16 - 1, 200}
    with (tmp_path / "mem_spd.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["section"], row["mode"]) for row in rows] == [
        ("steps", "dense-cudnn"),
        ("steps", "mustafar-0.7"),
        ("generation", "mustafar-0.7"),
    ]
    printed = capsys.readouterr().out
    assert "x dense-cudnn" in printed and "dense-cudnn decodes no text" in printed


def test_ranks_divide_a_preset(monkeypatch) -> None:
    """Half of everything on each of two, and sums over both: here of one with itself."""
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: summed.append(x.shape) or x.mul_(2))
    model = load("tiny", "float32", "cpu", Ranks(2, 0, 0))
    shape = Shape.of(model)
    assert (shape.kv_heads, shape.head_dim) == (1, 64) and model.config.intermediate_size == 128
    ids = torch.ones(1, 5, dtype=torch.long)
    x = torch.randn(1, 5, 128)
    mlp = model.model.layers[0].mlp
    partial = torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    assert torch.equal(mlp(x), 2 * partial)
    summed.clear()
    model(ids)
    assert summed == [(1, 5, 128)] * 4
    with pytest.raises(UserError, match="3 ranks: num_attention_heads is 4"):
        load("tiny", "float32", "cpu", Ranks(3, 0, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks = Ranks.of_environment()
    assert ranks == Ranks(2, 1, 1) and ranks.device("cpu") == "cpu"
    with pytest.raises(UserError, match="a GPU of its own"):
        ranks.device("cuda:0")


def test_bytes_of_the_paper_s_models() -> None:
    """Llama-3-8B, 8192 tokens, half precision: 1 GiB dense; 0.375 of it pruned to 70 %, window aside."""
    shape = Shape(32, 8, 128, 2, 0, 128256)
    dense = parse("dense-flash").kv_bytes(shape, 1, 8192)
    pruned = parse("mustafar-0.7").kv_bytes(shape, 1, 8192)
    window = 2 * 32 * 8 * 351 * 256
    assert dense == 2**30 and pruned - window == 0.375 * 2**30
    assert (
        parse("mustafar-0.7").kv_bytes(shape, 1, 0, tokens=8192 + 32) == 0.375 * 2**30 + 2 * 32 * 8 * 32 * 256
    )
    assert set(PRESETS) >= {"llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.1-8b", "mistral-7b"}


@pytest.mark.parametrize("known,tries", [(None, 4), (70, 1), (79, 4)])
def test_largest_shrinks_until_it_fits(known, tries, monkeypatch) -> None:
    def step_row(model, mode, batch, *others):
        if batch > 70:
            raise measure.DoesNotFit(known)
        return {"batch": batch, "section": "steps"}

    monkeypatch.setattr(measure, "step_row", step_row)
    model, tried = load("tiny", "float32", "cpu"), []
    row = measure.largest_row(model, parse("mustafar-0.7"), 100, 8, 1e9, tried.append, limit=80)
    assert row == {"batch": 70, "section": "largest"} and len(tried) == tries


@pytest.mark.parametrize(
    "error,said",
    [
        (torch.OutOfMemoryError("no"), "does not fit the memory"),
        (CacheDoesNotFit("no", 2), "the cache of at most a batch of 2 does"),
    ],
    ids=["allocator", "cache"],
)
def test_out_of_memory_is_said(error, said, monkeypatch, tmp_path, capsys) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(measure, "fill", fail)
    arguments = "--model tiny --context 100 --batch 3 --quick --device cpu --no_plots --sections steps"
    assert main([*arguments.split(), "--modes", "mustafar-0.5", "--out", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", "mustafar", "mustafar-1.5", "mustafar-x", "dense-0.5"])
def test_unknown_modes(name: str) -> None:
    with pytest.raises(UserError, match="unknown mode"):
        parse(name)


@pytest.mark.parametrize(
    "options,match",
    [
        ("--model no_such_model", "neither a preset"),
        ("--model /no_such_folder", "neither a preset"),
        ("--model tiny --batch 0", "--batch"),
        ("--model tiny --new 1", "--new"),
        ("--model tiny --modes sparse", "unknown mode"),
        (
            "--model tiny --modes dense-cudnn",
            "dense-cudnn needs a GPU that cuDNN's attention runs on, this is cpu",
        ),
    ],
)
def test_bad_input(options: str, match: str, tmp_path, capsys) -> None:
    assert main([*options.split(), "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert match in capsys.readouterr().err
