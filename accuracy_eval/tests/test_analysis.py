"""The analysis: what it captures, the errors it measures, the files it writes, the input it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from benchmarks.analysis import capture, command, measure
from benchmarks.shared import models
from longbench_helpers import WORDS, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = " ".join(WORDS[7 * i % len(WORDS)] for i in range(150))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def test_what_is_captured_is_the_models_own_cache(model):
    from transformers import AutoModelForCausalLM

    info = models.inspect_model(str(model))
    ids = info.tokenizer(TEXT).input_ids
    layers: list[capture.Layer] = []
    network = capture.load(info, "float32", "cpu")
    assert capture.prefill(network, ids, 40, layers.append) == 2 and not capture._LISTENERS
    plain = AutoModelForCausalLM.from_pretrained(model)
    cache = plain(torch.tensor([ids]), use_cache=True).past_key_values
    for index, layer in enumerate(layers):
        assert layer.index == index and layer.queries.shape == (2, 40, 64) and layer.scaling == 64**-0.5
        torch.testing.assert_close(layer.keys, cache.layers[index].keys[0])
        torch.testing.assert_close(layer.values, cache.layers[index].values[0])


def random_layer(tokens=100, window=0) -> capture.Layer:
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 64, 8), (2, tokens, 8), (2, tokens, 8))
    queries, keys, values = (torch.randn(shape, generator=draw) for shape in shapes)
    return capture.Layer(0, queries, keys, values, 0.5, window)


@pytest.mark.parametrize("window", [0, 20])
def test_an_error_by_hand(window):
    """Loops over heads, queries and tokens; the smaller half of each old token's channels set to zero."""
    layer = random_layer(window=window)
    keys, values = layer.keys.numpy().copy(), layer.values.numpy().copy()
    for x in (keys, values):
        for head in range(2):
            for token in range(100 - 32 - 16):  # but for the held-out queries' tokens and a window of 16
                x[head, token, np.argsort(np.abs(x[head, token]))[:4]] = 0

    def attend(keys, values):
        out = np.empty((4, 32, 8))
        for head in range(4):
            for n in range(32):
                own = 100 - 32 + n
                seen = range(max(0, own - window + 1) if window else 0, own + 1)
                query = layer.queries[head, 64 - 32 + n].numpy()
                weights = np.exp([0.5 * query @ keys[head // 2, t] for t in seen])
                out[head, n] = weights / weights.sum() @ values[head // 2, list(seen)]
        return out

    dense = attend(layer.keys.numpy(), layer.values.numpy())
    expected = np.linalg.norm(attend(keys, values) - dense) / np.linalg.norm(dense)
    pruned = measure.PrunedLayer(layer, residual_length=16, group_size=32)
    assert pruned.error(measure.Case("Kt_Mag", 0.5, "Vt_Mag", 0.5)) == pytest.approx(expected, rel=1e-4)
    assert pruned.error(measure.Case("Kt_Mag", 0.0, "Vt_Mag", 0.0)) == 0


@pytest.mark.parametrize(
    "rule", ["Kt_Mag", "Kt_Opt", "ThinK", "Vt_Mag", "Vt_Opt", "Vc_Mag", "Vc_Opt", "ThinV"]
)
def test_patterns_of_all_rules(rule):
    """Half of the old tokens goes, the others stay; queries that are measured on decide nothing."""
    layer = random_layer()
    kept = measure.PrunedLayer(layer, 4, 32).pattern(rule, 0.5)
    old = 100 - 32 - 4  # whole groups of 32
    assert (kept[:, :old] == 0).float().mean() == 0.5 and (kept[:, old:] != 0).all()
    layer.queries[:, -32:] *= torch.arange(1, 9) ** 3
    assert torch.equal(measure.PrunedLayer(layer, 4, 32).pattern(rule, 0.5), kept)


def test_magnitudes():
    x = torch.arange(-100, 101.0)[None, :, None].repeat(2, 1, 3)
    x[:, :, 2] *= 5
    found = measure.magnitudes(x)
    assert found.mean.shape == (2, 3) and found.quantiles.shape == (3, 2, 3)
    assert found.quantiles[:, 0, 0].tolist() == [5, 50, 95]
    assert found.peak() == pytest.approx(5)


def test_the_command(model, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text(TEXT)
    out = tmp_path / "out"
    fixed = [str(model), "--file", str(tmp_path / "prompt.txt"), "--device", "cpu", "--output", str(out)]
    assert (
        command.main([*fixed, "--k_rules", "Kt_Mag", "ThinK", "--v_rules", "Vt_Mag", "--sparsities", "0.5"])
        == 0
    )
    assert "Kt_Mag + Vt_Mag" in capsys.readouterr().out
    for name in ("magnitudes", "pattern", "errors"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with (out / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 and all(0 < float(row["relative_error"]) < 2 for row in rows)
    with (out / "magnitudes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 64
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == 151 and len(summary["mean_error"]) == 4 and set(summary["peak"]) == {"0", "1"}
    mean = sum(float(row["relative_error"]) for row in rows[:2]) / 2
    assert summary["mean_error"][0]["error"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "w1 w2"], "the prompt has 3 tokens; an analysis takes at least 96"),
        (["--text", " ".join(["w1"] * 600)], "tiny takes 512; give --max_length 512"),
        (["--file", "none.txt"], "cannot read --file none.txt"),
        (["--text", TEXT, "--k_rules", "Vt_Mag"], "k_rule 'Vt_Mag' prunes values"),
        (["--text", TEXT, "--v_rules", "nope"], "unknown v_rule 'nope'"),
        (["--text", TEXT, "--k_rules", "--v_rules"], "nothing to prune"),
        (["--text", TEXT, "--layers", "2"], "the model has 2 layers, 0 to 1"),
        (["--text", TEXT, "--head", "1"], "tiny has 1 KV heads, 0 to 0"),
    ],
)
def test_bad_input(model, tmp_path, capsys, options, message):
    assert command.main([str(model), *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_plain_attention_is_refused(tmp_path, capsys):
    folder = make_model(tmp_path / "capped", "gemma2")
    assert (
        command.main([str(folder), "--text", TEXT, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    )
    assert "softcap" in capsys.readouterr().err
