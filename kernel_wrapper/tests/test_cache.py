"""The cache by itself: when it prunes, what it holds, crops, reorders, its sizes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from mustafar import reference
from mustafar.cache import MustafarCache
from mustafar.format import num_kept
from mustafar.history import PackedHistory
from mustafar.layer import CompressedKV, MustafarLayer
from tiny_models import cache_for, one_thread, tiny
from transformers import Gemma2Config, LlamaConfig, LlavaConfig, T5Config
from transformers.cache_utils import DynamicSlidingWindowLayer

__all__ = ["one_thread"]

HEADS, HEAD_DIM = 2, 64


def small_config(**settings: object) -> LlamaConfig:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": HEAD_DIM, "num_hidden_layers": 2}
    return LlamaConfig(**{**shape, **settings})


def tokens(
    count: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values [B, Hkv, count, D]; the values transposed, as models pass them."""
    keys = torch.randn(batch, HEADS, count, HEAD_DIM).to(dtype)
    return keys, torch.randn(batch, count, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)


def held(cache: MustafarCache, layer: int = 0) -> tuple[torch.Tensor, ...]:
    return tuple(history.dense() for history in cache.layers[layer].histories)


def prune_by_hand(x: torch.Tensor, count: int, sparsity: float) -> torch.Tensor:
    """x with the oldest `count` tokens pruned by magnitude."""
    keep = reference.magnitude_keep(x, num_kept(sparsity, x.shape[-1]))
    keep[:, :, count:] = True
    return torch.where(keep, x, 0)


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
@pytest.mark.parametrize("prompt", [1, 5, 40, 100, 160])
def test_tokens_are_pruned_when_they_should_be(backend: str, prompt: int) -> None:
    """After the prefill all but the last 32; then 40 at once when 40 more have gathered, one step later."""
    cache = MustafarCache(small_config(), 0.7, 0.5, flush_every=40, backend=backend)
    keys, values = tokens(prompt)
    result = cache.update(keys, values, 0)
    assert result[0] is keys and result[1] is values  # the first prefill attends to all of its own tokens
    pruned = max(0, prompt - 32)
    for step in range(1, 131):
        for x, expected, sparsity in zip(held(cache), (keys, values), (0.7, 0.5), strict=True):
            assert torch.equal(x, prune_by_hand(expected, pruned, sparsity)), step
        if keys.shape[2] - pruned == 72:
            pruned += 40
        new = tokens(1)
        result = cache.update(*new, 0)
        keys, values = torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2)
        assert cache.get_seq_length() == keys.shape[2]
        if backend == "simulate":
            assert torch.equal(result[0], held(cache)[0]) and torch.equal(result[1], held(cache)[1])
        else:
            assert isinstance(result[0], CompressedKV) and result[0] is result[1]


def test_the_window_needs_no_more_room_than_it_was_given() -> None:
    cache = MustafarCache(small_config(), 0.5, 0.5)
    cache.update(*tokens(95), 0)  # 63 pruned tokens wait for a slice
    history: PackedHistory = cache.layers[0].key_history
    place = history.window.data_ptr()
    for _ in range(600):
        cache.update(*tokens(1), 0)
        assert history.window_tokens <= 32 + 256 + 63
    assert history.window.data_ptr() == place and history.window.shape[2] == 351


@pytest.mark.parametrize("turn", [20, 300])
def test_a_longer_later_turn_gets_everything_dense(turn: int) -> None:
    """One longer than flush_every is pruned at once, but only after it was attended to."""
    results = []
    for backend in ("simulate", "kernel"):
        torch.manual_seed(0)
        cache = MustafarCache(small_config(), 0.7, 0.7, backend=backend)
        first, second = tokens(150), tokens(turn)
        cache.update(*first, 0)
        full = cache.update(*second, 0)
        for x, old, new in zip(full, first, second, strict=True):
            assert torch.equal(x, torch.cat([prune_by_hand(old, 118, 0.7), new], dim=2))
        assert cache.layers[0].key_history.pruned == (118 if turn == 20 else 150 + turn - 32)
        results.append(held(cache))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
@pytest.mark.parametrize("remove", [1, 30, 50, 100, 150, 299, 300, 400])
def test_crop_then_continue(backend: str, remove: int) -> None:
    """Into the window, into tokens pruned but not packed, into packed slices, to nothing; then go on."""
    cache = MustafarCache(small_config(), 0.5, 0.5, flush_every=40, backend=backend)
    keys, values = tokens(300)
    cache.update(keys, values, 0)
    keys, values = held(cache)
    cache.layers[0].crop(torch.tensor(-remove))
    left = max(0, 300 - remove)
    assert cache.get_seq_length() == left
    if left:
        assert torch.equal(held(cache)[0], keys[:, :, :left])
    pruned = min(left, 268)
    new = tokens(90)
    for position in range(90):
        cache.update(new[0][:, :, position : position + 1], new[1][:, :, position : position + 1], 0)
    unpruned = left - pruned + 90
    pruned += 40 * ((unpruned - 1 - 32) // 40)  # the last flush is still to come
    expected = torch.cat([values[:, :, :left], new[1]], dim=2)
    assert torch.equal(held(cache)[1], prune_by_hand(expected, pruned, 0.5))


def test_crop_of_every_transformers_version() -> None:
    cache = MustafarCache(small_config(), 0.5, 0.5)
    for layer in range(2):
        cache.update(*tokens(50), layer)
    cache.crop(0)
    assert cache.get_seq_length() == 50
    cache.crop(-3)
    assert cache.get_seq_length(1) == 47
    cache.crop(40)  # the length to keep, as generate asked before 5.14
    assert cache.get_seq_length() == 40
    cache.crop(41)
    assert cache.get_seq_length() == 40
    MustafarCache(small_config(), 0.5, 0.5).crop(-1)  # nothing there


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
def test_batch_operations(backend: str) -> None:
    cache = MustafarCache(small_config(), 0.7, 0.7, backend=backend)
    cache.update(*tokens(200, batch=3), 0)
    expected = held(cache)
    for act, rows in (
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 2])), lambda x: x[[2, 0, 2]]),
        (lambda: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, dim=0)),
        (lambda: cache.batch_select_indices(torch.tensor([5, 1])), lambda x: x[[5, 1]]),
    ):
        act()
        expected = tuple(map(rows, expected))
        assert all(torch.equal(*pair) for pair in zip(held(cache), expected, strict=True))
    cache.update(*tokens(1, batch=2), 0)
    assert cache.get_seq_length() == 201


def test_sizes() -> None:
    cache = MustafarCache(small_config(), 0.5, 0.5)
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(7, 0) == (7, 0)
    cache.update(*tokens(50), 0)
    assert cache.get_mask_sizes(1, 0) == cache.layers[0].get_mask_sizes(torch.arange(50, 51)) == (51, 0)
    assert cache.layers[0].get_mask_sizes(torch.tensor(4)) == (54, 0)
    assert (
        cache.get_max_length() == cache.get_max_cache_shape() == cache.layers[0].get_max_cache_shape() == -1
    )
    assert not cache.is_compileable and cache.is_sliding == [False, False]


def test_memory_is_what_the_format_takes() -> None:
    cache = MustafarCache(small_config(head_dim=128), 0.7, 0.5)
    shape = (2, 3, 64 * 7 + 32, 128)
    for layer in range(2):
        cache.update(torch.randn(shape).half(), torch.randn(shape).half(), layer)
    rows = 2 * 2 * 3 * 64 * 7  # of layers, batch, heads, tokens
    used = cache.memory()
    assert used["compressed_bytes"] == rows * (40 * 2 + 16) + rows * (64 * 2 + 16)
    assert used["window_bytes"] == 2 * 2 * 2 * 3 * 32 * 128 * 2
    assert used["dense_equivalent_bytes"] == 2 * 2 * 2 * 3 * shape[2] * 128 * 2
    assert used["allocated_bytes"] >= used["compressed_bytes"] + used["window_bytes"]
    assert MustafarCache(small_config(), 0.7, 0.5).memory()["compressed_bytes"] == 0


def test_a_copy_continues_by_itself() -> None:
    """Prefix caching: fill once, copy for each continuation."""
    cache = MustafarCache(small_config(), 0.5, 0.5)
    cache.update(*tokens(120), 0)
    before = held(cache)
    other = copy.deepcopy(cache)
    for _ in range(400):
        other.update(*tokens(1), 0)
    assert other.get_seq_length() == 520 and cache.get_seq_length() == 120
    assert torch.equal(held(other)[0][:, :, :88], before[0][:, :, :88])
    assert torch.equal(held(cache)[1], before[1])


def test_which_layers_are_replaced() -> None:
    assert {type(layer) for layer in cache_for(tiny("mistral_sliding"), "kernel").layers} == {MustafarLayer}
    kinds = [type(layer) for layer in cache_for(tiny("qwen3_mixed"), "kernel").layers]
    assert kinds == [MustafarLayer, DynamicSlidingWindowLayer]


def test_only_the_language_model_of_a_composite_changes_its_attention() -> None:
    config = LlavaConfig(text_config=small_config())
    config._attn_implementation = "sdpa"
    MustafarCache(config, 0.5, 0.5, backend="simulate")
    assert config.text_config._attn_implementation == "sdpa"
    cache = MustafarCache(config, 0.5, 0.5)
    assert len(cache.layers) == 2
    assert config.text_config._attn_implementation == "mustafar"
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "settings,error,message",
    [
        ({"k_sparsity": 1.0}, ValueError, r"k_sparsity is the fraction of zeros .* got 1.0"),
        ({"v_sparsity": -0.5}, ValueError, "v_sparsity is the fraction"),
        ({"k_rule": "Vt_Mag"}, ValueError, "k_rule 'Vt_Mag' prunes values"),
        ({"v_rule": "Best"}, ValueError, "unknown v_rule 'Best'; valid: Vt_Mag"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"residual_length": -1}, ValueError, "residual_length is a number of tokens .* at least 0, got -1"),
        ({"flush_every": 0}, ValueError, "flush_every"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'; valid: kernel, simulate"),
        ({"offloading": True}, NotImplementedError, "offloading"),
    ],
)
def test_bad_arguments(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MustafarCache(small_config(), **settings)


@pytest.mark.parametrize(
    "config,error,message",
    [
        ({}, TypeError, "config: expected model.config, got dict"),
        (T5Config(), NotImplementedError, "'t5' is an encoder-decoder"),
        (small_config(head_dim=512), NotImplementedError, "head_dim 512; at most 256"),
        (Gemma2Config(head_dim=64), NotImplementedError, "soft-caps its attention scores"),
        (small_config(attention_chunk_size=16), NotImplementedError, "no layer of full attention to prune"),
    ],
)
def test_unsupported_models(config: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MustafarCache(config, 0.5, 0.5)


def test_unsupported_tensors() -> None:
    keys, values = tokens(10)
    with pytest.raises(NotImplementedError, match=r"layer 1: keys and values must both be .* head_dim\]"):
        MustafarCache(small_config(), 0.5, 0.5).update(keys, values[..., :32], 1)
    with pytest.raises(TypeError, match=r"layer 0: keys and values on cpu must have one dtype of float16"):
        MustafarCache(small_config(), 0.5, 0.5).update(keys.double(), values.double(), 0)
    with pytest.raises(NotImplementedError, match="head_dim must be 1 to 256, got 257"):
        wide = torch.zeros(1, 1, 2, 257)
        MustafarCache(small_config(), 0.5, 0.5).update(wide, wide, 0)
    cache = MustafarCache(small_config(), 0.5, 0.5)
    cache.update(keys, values, 0)
    with pytest.raises(ValueError, match=r"holds a batch of 2, got tokens for a batch of 1: call reset"):
        cache.update(keys[:1], values[:1], 0)
    with pytest.raises(NotImplementedError, match="offloading is not supported"):
        cache.layers[0].offload()


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
def test_check_names_where_a_nan_entered(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("MUSTAFAR_CHECK", "1")
    cache = MustafarCache(small_config(), 0.5, 0.5, backend=backend)
    cache.update(*tokens(50), 1)
    keys, values = tokens(3)
    values[1, 0, 2, 7] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"NaN in the values of layer 1 at position 52 \(batch 1, KV head 0"
    ):
        cache.update(keys, values, 1)


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
def test_nan_is_kept(backend: str) -> None:
    cache = MustafarCache(small_config(), 0.9, 0.9, backend=backend)
    keys, values = tokens(200)
    keys[0, 1, 3, 60] = torch.nan
    values[1, 0, 150, 1] = -torch.nan
    cache.update(keys, values, 0)
    assert [x.isnan().nonzero().tolist() for x in held(cache)] == [[[0, 1, 3, 60]], [[1, 0, 150, 1]]]
