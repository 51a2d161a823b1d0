"""The benchmark at tiny shapes: what it writes, prints and refuses, and its arithmetic on made-up numbers."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from mustafar import ops, reference
from mustafar.kernel.benchmark import cli, flashinfer_peer, machine, measure, peers, plots, report, shapes
from mustafar.kernel.benchmark.problem import Corner, Problem
from mustafar.kernel.benchmark.timing import Timer, Times

QUICK = ["--quick", "--device", "cpu", "--rep_ms", "0.1"]
CPU = torch.device("cpu")
SMALL = shapes.Shape(8, 2, 2, 130, head_dim=64, window=20)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run on the CPU."""
    folder = tmp_path_factory.mktemp("bench")
    assert cli.main([*QUICK, "--output", str(folder)]) == 0
    return folder


def bench(**how: object) -> measure.Bench:
    return measure.Bench(Timer(CPU, rep_ms=0.1), 0.02, with_flashinfer=False, **how)


def test_csv_has_every_column_and_its_type(quick):
    header = (quick / "cpu.csv").read_text().splitlines()[0].split(",")
    assert header == list(report.COLUMNS)
    rows = report.read_csv(quick / "cpu.csv")
    assert {row["section"] for row in rows} == set(shapes.SECTIONS)
    for row in rows:
        for name, value in row.items():
            assert value is None or isinstance(value, report.COLUMNS[name]), name
        for name in (*"gpu driver date commit torch triton cuda flashinfer op batch kv_heads".split(),
                     *"tokens head_dim dtype sparsity layout median_ms p20_ms p80_ms bytes".split(),
                     *"tb_per_s fraction_of_copy copy_tb_per_s accurate".split()):  # fmt: skip
            assert row[name] is not None, name
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["accurate"]
        assert row["tb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e9, rel=1e-3)
    attention = [row for row in rows if row["op"] == "decode_attention"]
    assert all(row["torch_sdpa_ms"] and row["torch_matmul_ms"] and row["max_error"] for row in attention)
    for row in attention:
        best = min(row["torch_sdpa_ms"], row["torch_matmul_ms"])
        assert row["vs_best_dense"] == pytest.approx(best / row["median_ms"], rel=1e-3)
    # 2 sequences, 2 KV heads, 512 tokens; K and V: 16 bytes of bitmap and 40 slots of 2 bytes a row at 70 %.
    assert attention[0]["bytes"] == 2 * 2 * 512 * 2 * (16 + 80)
    assert {row["layout"] for row in attention} == {"uniform", "general"}
    assert {row["op"] for row in rows} - {"decode_attention"} == set(
        "key_scores value_output prune_compress compress decompress".split()
    )


def test_plots_and_crossovers(quick):
    for name in ("sparsity", "context", "batch"):
        data = (quick / f"cpu_{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    found = json.loads((quick / "cpu_crossover.json").read_text())
    assert {"q_heads", "kv_heads", "batch", "tokens", "group", "eager"} <= set(found["shapes"][0])
    assert found["runs"][0]["torch"] == torch.__version__


def test_only_keeps_the_rows_of_other_sections(tmp_path, capsys):
    arguments = [*QUICK, "--output", str(tmp_path), "--no_plots"]
    assert cli.main([*arguments, "--only", "spmv", "--commit", "first"]) == 0
    assert cli.main([*arguments, "--only", "batch", "--commit", "second"]) == 0
    assert cli.main([*arguments, "--only", "batch", "--commit", "third"]) == 0
    rows = report.read_csv(tmp_path / "cpu.csv")
    assert {(row["section"], row["commit"]) for row in rows} == {("spmv", "first"), ("batch", "third")}
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].startswith("attention")  # the table comes last
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "attention,nonsense"], "unknown section nonsense; valid: attention, spmv"),
        (["--rep_ms", "0"], "expected milliseconds above 0"),
        (["--device", "tpu"], "must be cpu, cuda"),
        (["--device", "cuda:99"], "this torch sees"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_of_other_columns_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / "cpu.csv").write_text("gpu,ms\nx,1\n")
    assert cli.main([*QUICK, "--output", str(tmp_path)]) == 2
    assert "other columns" in capsys.readouterr().err
    assert (tmp_path / "cpu.csv").read_text() == "gpu,ms\nx,1\n"


def test_a_case_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(*_: object, **__: object):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(measure.ops, "decode_attention", fail)
    assert cli.main([*QUICK, "--output", str(tmp_path), "--only", "batch,spmv"]) == 1
    assert "FAILED: batch, 8/2 heads, batch 1, 256 tokens" in capsys.readouterr().out
    assert {row["section"] for row in report.read_csv(tmp_path / "cpu.csv")} == {"spmv"}


def test_an_inaccurate_kernel_is_reported(tmp_path, monkeypatch, capsys):
    right = ops.key_scores
    monkeypatch.setattr(measure.ops, "key_scores", lambda q, c: right(q, c) * 1.01)
    assert cli.main([*QUICK, "--output", str(tmp_path), "--only", "spmv"]) == 1
    assert "INACCURATE: key_scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [
        ({}, None),
        ({0.5: 0.9, 0.7: 1.1}, ("=", pytest.approx(0.6))),
        ({0.7: 1.3, 0.3: 0.7, 0.5: 0.9}, ("=", pytest.approx(0.55))),
        ({0.3: 1.2, 0.5: 0.9, 0.7: 1.1}, ("=", pytest.approx(0.6))),  # from there on, whatever was below
        ({0.3: 1.0, 0.7: 1.1}, ("<=", 0.3)),
        ({0.3: 1.2, 0.7: 0.99}, (">", 0.7)),
    ],
)
def test_faster_from(ratios, answer):
    assert report.faster_from(ratios) == answer


def made_up(section: str, ratios: dict[float, float], **columns: object) -> list[report.Row]:
    base = {name: "x" for name, kind in report.COLUMNS.items() if kind is str}
    base |= {"section": section, "op": "decode_attention", "layout": "uniform", "best_dense": "cudnn"}
    base |= {"batch": 8, "q_heads": 32, "kv_heads": 8, "tokens": 8192, "head_dim": 128, "window": 160}
    base |= {"dtype": "float16", "bytes": 10**8, "tb_per_s": 2.0, "copy_tb_per_s": 4.0, "accurate": True}
    base |= {"fraction_of_copy": 0.5, "p20_ms": 0.9, "median_ms": 1.0, "p80_ms": 1.1} | columns
    return [base | {"sparsity": s, "vs_best_dense": r, "cudnn_ms": r} for s, r in ratios.items()]


def test_crossovers_prefer_the_longest_series_and_know_graphs():
    rows = made_up("attention", {0.5: 1.5, 0.7: 2.0}) + made_up("sweep", {0.3: 0.5, 0.5: 0.9, 0.7: 1.1})
    rows += made_up("context", {0.5: 1.1, 0.7: 1.2}, batch=1, vs_best_dense_graph=0.8)
    rows += made_up("batch", {0.5: 1.1}, batch=2) + made_up("attention", {0.3: 9.0}, layout="general")
    sweep, context = report.crossovers(rows)
    assert (sweep["section"], sweep["eager"]["relation"], sweep["eager"]["sparsity"]) == ("sweep", "=", 0.6)
    assert sweep["group"] == 4 and "cuda_graph" not in sweep
    assert context["eager"]["relation"] == "<=" and context["cuda_graph"]["relation"] == ">"
    assert report.say_crossover(sweep) == "32/8 b8 8k D128 f16: from 0.60 on"
    assert "in a CUDA graph not up to 0.70" in report.say_crossover(context)


def test_plots_draw_every_dense_peer(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for section, tokens in (("sweep", 8192), ("context", 1024), ("context", 4096), ("batch", 8192)):
        rows += made_up(
            section, {0.5: 0.9, 0.7: 1.1}, tokens=tokens, flashinfer_ms=1.2, vs_best_dense_graph=1
        )
    written = plots.draw(rows, tmp_path, "gpu")
    assert [path.name for path in written] == ["gpu_sparsity.png", "gpu_context.png", "gpu_batch.png"]
    assert plots.draw([], tmp_path, "gpu") == []


def arguments(**other: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(**({"device": "cuda", "no_flashinfer": False} | other))


def test_flashinfer_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found, notes = cli.find_flashinfer(arguments(), [])
    assert found == "not installed"
    assert notes == ["FlashInfer: not installed, so the best dense kernel is the best of the others"]
    assert cli.find_flashinfer(arguments(no_flashinfer=True), [])[0] == "left out"
    assert cli.find_flashinfer(arguments(device="cpu"), []) == ("none", [])


def test_flashinfer_that_does_not_import_or_build_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "flashinfer").mkdir()
    module = tmp_path / "flashinfer" / "__init__.py"
    module.write_text("import tvm_ffi_of_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    assert flashinfer_peer.version() == "does not import: no module tvm_ffi_of_nowhere"
    module.write_text("raise OSError('no driver')\n")
    assert flashinfer_peer.version() == "does not import: OSError: no driver"
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(__version__="0.6.13"))

    def fail(cases: object) -> None:
        raise RuntimeError("Ninja build failed.\nno nvcc")

    monkeypatch.setattr(flashinfer_peer, "build", fail)
    found, notes = cli.find_flashinfer(arguments(), [])
    assert found == "0.6.13 does not build" and not flashinfer_peer.usable(found)
    assert notes == ["FlashInfer 0.6.13: Ninja build failed."] and "no nvcc" in capsys.readouterr().out


def test_pages_hold_the_cache_in_order():
    paged = object.__new__(flashinfer_peer.Paged)
    paged.tokens, paged.pages = 35, 3
    x = torch.randn(2, 4, 35, 8)
    pages = paged.paged(x)
    assert pages.shape == (6, 16, 4, 8) and pages.is_contiguous()
    assert torch.equal(pages.view(2, 48, 4, 8)[:, :35].transpose(1, 2), x)


def test_a_peer_that_is_wrong_or_refuses_is_noted_and_left_out():
    problem, runner = Problem(SMALL, CPU), bench()
    good = peers.attention_peers(SMALL, CPU, False)[0]

    def refuses(problem: Problem):
        raise RuntimeError("head_dim 64 is not\nsupported")

    wrong = peers.Peer("cudnn", lambda problem: lambda: good.bind(problem)() + 1)
    found = runner.time_peers(
        [problem], [good, wrong, peers.Peer("flashinfer", refuses)], Corner(problem).attention
    )
    assert list(found) == ["torch_sdpa"]
    assert "cudnn at 8/2 heads, batch 2" in runner.notes[0] and "wrong result, error 1" in runner.notes[0]
    assert runner.notes[1].endswith("RuntimeError: head_dim 64 is not")


@pytest.mark.parametrize("layout", ["uniform", "general"])
def test_graph_times_fill_their_columns(monkeypatch, layout):
    """The path that only a GPU takes, with the capture replaced by plain calls."""
    runner = bench()
    seen: list[int] = []

    def graph(calls):
        seen.append(len([call() for call in calls]))
        return 0.25

    monkeypatch.setattr(runner.timer, "graph", graph)
    monkeypatch.setattr(
        runner, "copies", lambda first, moved: [first, *(Problem(SMALL, CPU, seed) for seed in (1, 2))]
    )
    case = shapes.Case("attention", SMALL, (0.5,), general=layout == "general")
    rows = list(runner.run(case))
    assert len(rows) == 1 + case.general and not runner.notes
    assert rows[-1]["layout"] == layout and rows[-1]["accurate"]
    assert rows[-1]["graph_ms"] == 0.25 and rows[-1]["torch_sdpa_graph_ms"] == 0.25
    assert rows[-1]["vs_best_dense_graph"] == 1 and set(seen) == {3}


def test_copies_outgrow_the_cache_and_fit_the_memory(monkeypatch):
    runner = bench()
    first = Problem(SMALL, CPU)
    assert runner.copies(first, 1000) == [first]  # no graphs on a CPU
    monkeypatch.setattr(runner, "device", types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Timer, "l2_bytes", 50 << 20)
    monkeypatch.setattr(measure, "Problem", lambda shape, device, seed: seed)
    assert len(runner.copies(first, 50 << 20)) == 8  # never fewer
    assert len(runner.copies(first, 10 << 20)) == 10  # twice the cache
    assert len(runner.copies(first, 1 << 10)) == 64  # never more
    monkeypatch.setattr(runner.timer, "fits", lambda needed: False)
    assert list(runner.run(shapes.Case("batch", SMALL, (0.5,)))) == []
    assert "not measured, too little free memory" in runner.notes[0]


def test_topk_gather_keeps_what_the_reference_keeps():
    x = torch.randn(1, 2, 64, 64).half()
    exact = reference.decompress(reference.prune_compress(x, 32))
    assert torch.equal(peers.topk_gather(x, 0.5).abs().sort(-1).values, exact.abs().sort(-1).values[..., 32:])


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_section_has_cases(on_gpu):
    cases = shapes.plan(shapes.SECTIONS, on_gpu)
    assert {case.section for case in cases} == set(shapes.SECTIONS)
    assert all(len(case.sparsities) > 1 for case in cases)


def test_quantiles_and_machine(monkeypatch):
    assert Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Times(3.5, 2.0, 5.0)
    assert machine.slug(CPU) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (MIG 1g)")
    assert machine.slug(torch.device("cuda")) == "nvidia_h200_mig_1g"
    monkeypatch.setattr(machine, "_output", lambda *command: None)  # no git
    assert machine.commit() == "unknown"
    monkeypatch.setattr(machine, "_output", lambda *command: "abc1234" if "rev-parse" in command else " M x")
    assert machine.commit() == "abc1234-dirty"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_quick_run_on_a_gpu(tmp_path):
    assert cli.main(["--quick", "--no_flashinfer", "--output", str(tmp_path)]) == 0
    rows = report.read_csv(next(tmp_path.glob("*.csv")))
    attention = [row for row in rows if row["op"] == "decode_attention"]
    assert all(row["cudnn_ms"] and row["graph_ms"] and row["cudnn_graph_ms"] for row in attention)
    assert all(row["cublas_ms"] for row in rows if row["section"] == "spmv")
