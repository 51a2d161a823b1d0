"""Merged matrix products: the same logits, parameters that stay the model's own, and parts that are left alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
from mustafar import Decoder
from mustafar.fusion import fused
from mustafar.merging import lay_together, merged
from tiny_models import cache_for, one_thread, padded_prompts, prompts, tiny
from torch import nn
from transformers import AutoModelForCausalLM

__all__ = ["one_thread"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_nothing_left_behind(family: str, tmp_path) -> None:
    model, ids = tiny(family), prompts(2, 30)
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None):
        nn.init.normal_(linear.bias)  # Qwen2's
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with torch.no_grad():
        expected = model(ids).logits
        assert lay_together(model) == 4  # two layers
        assert torch.equal(model(ids).logits, expected)
        with merged(model):
            assert not isinstance(model.model.layers[0].self_attn.k_proj, nn.Linear)
            got = model(ids).logits
    assert torch.allclose(got, expected, atol=1e-4) and expected.abs().max() > 1
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_no_bytes_more_and_no_second_move() -> None:
    model = tiny("llama")
    lay_together(model)
    attention = model.model.layers[0].self_attn
    storage = attention.q_proj.weight.untyped_storage()
    assert storage.nbytes() == sum(getattr(attention, f"{n}_proj").weight.nbytes for n in "qkv")
    addresses = [p.data_ptr() for p in model.parameters()]
    assert lay_together(model) == 4 and [p.data_ptr() for p in model.parameters()] == addresses
    model.double()  # moves them
    assert lay_together(model) == 4 and model(prompts(1, 5)).logits.dtype == torch.float64


def test_parts_that_are_more_than_linear_are_left_alone() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny("llama")
    first, second = model.model.layers
    first.self_attn.q_proj = Adapted(128, 256, bias=False)
    second.self_attn.v_proj.register_forward_hook(lambda module, args, output: output * 2)
    second.mlp.up_proj.forward = lambda x: x @ second.mlp.up_proj.weight.T
    ids = prompts(1, 9)
    expected = model(ids).logits
    assert lay_together(model) == 1
    with merged(model):
        assert type(first.self_attn.q_proj) is Adapted
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_a_group_without_room_is_left_alone(monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    model = tiny("llama")
    monkeypatch.setattr(torch, "cat", full)
    assert lay_together(model) == 0


def test_another_input_is_multiplied_by_itself() -> None:
    """Keys of something else than the queries are: no product of theirs is there."""
    model = tiny("llama")
    lay_together(model)
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 3, 128)
    expected = [
        part(y) for part, y in ((attention.q_proj, x), (attention.k_proj, other), (attention.v_proj, x))
    ]
    with merged(model):
        got = [
            part(y) for part, y in ((attention.q_proj, x), (attention.k_proj, other), (attention.v_proj, x))
        ]
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_once_for_all_layers(family: str) -> None:
    torch._dynamo.reset()
    model = tiny(family, num_hidden_layers=4)
    lay_together(model)
    ids, mask = padded_prompts(3, 60, 10)
    decoder = Decoder(
        model, cache_for(model, "kernel", static=True, max_length=150, residual_length=8, flush_every=16), 3
    )
    seen = torch.zeros(3, model.config.vocab_size)
    choose = decoder._choose

    def record(logits: torch.Tensor) -> None:
        seen.copy_(logits)
        choose(logits)

    decoder._choose = record
    found = []
    for compiled in (False, True):
        decoder.prefill(ids, mask)
        torch._dynamo.utils.counters.clear()
        with fused(model, decoder.cache, backend="aot_eager") if compiled else contextlib.nullcontext():
            for _ in range(3):
                decoder.step()
        found.append(seen.clone())
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8, "layers must share their code"
    assert torch.allclose(*found, atol=1e-4) and found[0].abs().max() > 1
