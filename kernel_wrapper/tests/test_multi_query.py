"""A few queries on a filled cache: the same as on the decompressed one, without decompressing it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mustafar import ops
from mustafar.attention import mustafar_attention
from mustafar.layer import CompressedKV
from mustafar.multi_query import MOST_QUERIES
from mustafar.testing import accuracy
from tiny_models import cache_for, generate, one_thread, prompts, tiny
from transformers import LlamaConfig

__all__ = ["one_thread"]

MODULE = SimpleNamespace(layer_idx=0, num_key_value_groups=3, training=False, is_causal=True)
SHORT = {"residual_length": 8, "flush_every": 16}
STATIC = {"static": True, "max_length": 512}


def _filled(device: str, dtype: torch.dtype, batch: int, count: int, **settings: object) -> tuple:
    """A cache layer of 200 tokens and `count` new ones, which is what its `update` returned, and queries."""
    config = LlamaConfig(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=64
    )
    model = SimpleNamespace(config=config)
    cache = cache_for(model, "kernel", **settings)
    g = torch.Generator().manual_seed(count)
    x = torch.randn(2, batch, 2, 200 + count, 64, generator=g).to(device, dtype)
    cache.update(*x[:, :, :, :200], 0)
    handle, _ = cache.update(*x[:, :, :, 200:], 0)
    query = torch.randn(batch, 6, count, 64, generator=g).to(device, dtype)
    return cache.layers[0], handle, query


def _mask(starts: list[int], count: int, total: int, sliding: int, device: str) -> torch.Tensor:
    position = torch.arange(total, device=device)
    of_query = position[total - count :, None]
    seen = (position <= of_query) & (position >= torch.tensor(starts, device=device)[:, None, None])
    return (seen & (position > of_query - sliding if sliding else seen))[:, None]


@pytest.mark.parametrize("settings", [{}, STATIC, {"v_rule": "Vc_Mag"}], ids=["uniform", "static", "general"])
@pytest.mark.parametrize("starts,count", [([0], 2), ([40], 16), ([0, 70, 150], 2), ([0, 3, 90], 7)], ids=str)
@pytest.mark.parametrize("sliding", [0, 60])
def test_equals_the_decompressed_cache(target, settings, starts: list[int], count: int, sliding: int) -> None:
    device, dtype = target
    layer, handle, query = _filled(device, dtype, len(starts), count, **settings)
    assert isinstance(handle, CompressedKV) and sum(layer.held_tokens()) == 200 + count
    mask = _mask(starts, count, 200 + count, sliding, device)
    got, _ = mustafar_attention(MODULE, query, handle, handle, mask, sliding_window=sliding or None)
    assert mask._mustafar_rows[1], "taken for another kind of mask"

    def dense(kind: torch.dtype) -> torch.Tensor:
        keys, values = (x.repeat_interleave(3, dim=1).to(kind) for x in layer.dense())
        return F.scaled_dot_product_attention(query.to(kind), keys, values, mask).transpose(1, 2)

    result = accuracy(got, dense(dtype), dense(torch.float32))
    assert result.ok, result


def test_without_padding_and_with_the_mask_of_flash_attention() -> None:
    _, handle, query = _filled("cpu", torch.float32, 2, 5)
    causal = _mask([0, 0], 5, 205, 0, "cpu")
    expected, _ = mustafar_attention(MODULE, query, handle, handle, causal)
    got, _ = mustafar_attention(MODULE, query, handle, handle, None)
    assert torch.equal(got, expected)
    padding = torch.ones(2, 205, dtype=torch.long)
    padding[1, :30] = 0
    got, _ = mustafar_attention(MODULE, query, handle, handle, padding)
    expected, _ = mustafar_attention(MODULE, query, handle, handle, _mask([0, 30], 5, 205, 0, "cpu"))
    assert torch.equal(got, expected)
    padding[0, 7] = 0
    with pytest.raises(ValueError, match="batch row 0 masks positions"):
        mustafar_attention(MODULE, query, handle, handle, padding.clone())


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
def test_other_masks_take_the_decompressed_cache(settings: dict) -> None:
    """A tree of candidates: the third new token does not see the second."""
    layer, handle, query = _filled("cpu", torch.float32, 2, 4, **settings)
    mask = _mask([0, 20], 4, 204, 0, "cpu")
    mask[:, :, 2:, 201] = False
    keys, values = (x.repeat_interleave(3, dim=1) for x in layer.dense())
    for kind in (mask, torch.where(mask, 0.0, -torch.inf)):
        got, _ = mustafar_attention(MODULE, query, handle, handle, kind)
        expected = F.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2)
        assert torch.allclose(got, expected, atol=1e-5)


def _no_decompression(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(c: object) -> None:
        raise AssertionError("the cache was decompressed")

    monkeypatch.setattr(ops, "decompress", refuse)


@pytest.mark.parametrize("settings", [{}, STATIC, {"k_rule": "ThinK"}], ids=str)
def test_turns_of_a_few_tokens(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    results = []
    for backend in ("simulate", "kernel"):
        options = settings if backend == "kernel" or "static" not in settings else {}
        cache = cache_for(model, backend, flush_every=64, **options)
        ids = generate(model, prompts(2, 150), cache, new=21)
        if backend == "kernel" and not cache.settings.observes:  # those score by all keys
            _no_decompression(monkeypatch)
        for turn, added in enumerate((2, 9, MOST_QUERIES - 1)):  # and the last token of the turn before
            ids = torch.cat([ids, prompts(2, added, seed=turn + 5)], dim=1)
            ids = generate(model, ids, cache, new=21)
        results.append(ids)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["assistant", "prompt_lookup"])
def test_assisted_decoding_decompresses_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompts(1, 180)
    ids[:, 90:] = ids[:, :90]
    options = {"assistant_model": tiny("llama", num_hidden_layers=1)}
    options = options if kind == "assistant" else {"prompt_lookup_num_tokens": 5}
    options["eos_token_id"] = 0
    expected = generate(model, ids, cache_for(model, "simulate"), **options)
    _no_decompression(monkeypatch)
    assert torch.equal(generate(model, ids, cache_for(model, "kernel"), **options), expected)


def test_longer_turns_are_dense() -> None:
    _, handle, _ = _filled("cpu", torch.float32, 1, MOST_QUERIES)
    _, dense, _ = _filled("cpu", torch.float32, 1, MOST_QUERIES + 1)
    _, at_once, _ = _filled("cpu", torch.float32, 1, 5, flush_every=4)
    assert isinstance(handle, CompressedKV)
    assert dense.shape[2] == 200 + MOST_QUERIES + 1 and at_once.shape[2] == 205
