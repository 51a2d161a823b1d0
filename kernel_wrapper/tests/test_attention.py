"""The registered attention and mask functions: numbers, dispatch, and every way to call them wrongly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mustafar import attention
from mustafar.attention import mustafar_attention, mustafar_mask, register
from mustafar.cache import MustafarCache
from mustafar.layer import CompressedKV
from mustafar.testing import accuracy
from tiny_models import cache_for, generate, one_thread, prompts, tiny
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import causal_mask_function

__all__ = ["one_thread"]

MODULE = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)


def filled(
    device: str, dtype: torch.dtype, tokens: int, **settings: object
) -> tuple[MustafarCache, CompressedKV]:
    """A one-layer cache of `tokens` tokens in 2 rows, the last of them decoded, and its handle."""
    config = LlamaConfig(hidden_size=384, num_attention_heads=6, num_hidden_layers=1)
    cache = MustafarCache(config, 0.5, 0.5, **settings)
    x = torch.randn(2, 2, 2, tokens, 64, device=device, dtype=dtype)
    cache.update(x[0, :, :, :-1], x[1, :, :, :-1], 0)
    return cache, cache.update(x[0, :, :, -1:], x[1, :, :, -1:], 0)[0]


def padded_mask(starts: list[int], tokens: int, device: str = "cpu") -> torch.Tensor:
    """bool [B, 1, 1, T]"""
    position = torch.arange(tokens, device=device)
    return (position >= torch.tensor(starts, device=device)[:, None])[:, None, None]


@pytest.mark.parametrize("starts", [None, [0, 70], [64, 200]])
@pytest.mark.parametrize("tokens", [3, 98, 240])
def test_decoding_equals_dense_attention(target: tuple, tokens: int, starts: list[int] | None) -> None:
    device, dtype = target
    starts = starts and [min(start, tokens - 1) for start in starts]
    cache, handle = filled(device, dtype, tokens)
    mask = None if starts is None else padded_mask(starts, tokens, device)
    query = torch.randn(2, 6, 1, 64, device=device, dtype=dtype)
    got, weights = mustafar_attention(MODULE, query, handle, handle, mask, scaling=0.2)
    assert got.shape == (2, 1, 6, 64) and weights is None
    keys, values = (history.dense() for history in cache.layers[0].histories)

    def dense(kind: torch.dtype) -> torch.Tensor:
        q, k, v = (x.to(kind) for x in (query, keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1), attn_mask=mask, scale=0.2
        )
        return out.transpose(1, 2)

    result = accuracy(got, dense(dtype), dense(torch.float32))
    assert result.ok, result


def test_a_sliding_mask_and_the_sliding_argument_agree() -> None:
    _, handle = filled("cpu", torch.float32, 240)
    query = torch.randn(2, 6, 1, 64)
    by_mask = mustafar_attention(MODULE, query, handle, handle, padded_mask([140, 140], 240))[0]
    by_argument = mustafar_attention(MODULE, query, handle, handle, None, sliding_window=100)[0]
    assert torch.equal(by_mask, by_argument)


def test_a_mask_is_read_once_for_all_layers() -> None:
    _, handle = filled("cpu", torch.float32, 50)
    mask = padded_mask([3, 7], 50)
    starts = attention._starts(mask, 2, handle.layer)
    assert starts.tolist() == [3, 7] and starts.dtype == torch.int32
    assert attention._starts(mask, 2, handle.layer) is starts
    assert attention._starts(padded_mask([9], 50), 2, handle.layer).tolist() == [9, 9]


def test_ordinary_tensors_go_to_sdpa() -> None:
    query, key, value = torch.randn(2, 6, 5, 64), torch.randn(2, 2, 5, 64), torch.randn(2, 2, 5, 64)
    sdpa = AttentionInterface()["sdpa"](MODULE, query, key, value, None, scaling=0.1)[0]
    assert torch.equal(mustafar_attention(MODULE, query, key, value, None, scaling=0.1)[0], sdpa)


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
    assert AttentionInterface()["mustafar"] is mustafar_attention
    assert AttentionMaskInterface()["mustafar"] is mustafar_mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_gets_an_error_with_the_remedy(implementation: str) -> None:
    model = tiny("llama")
    cache = cache_for(model, "kernel")
    model.set_attn_implementation(implementation)
    with pytest.raises(
        RuntimeError, match=r'attn_implementation must be "mustafar".*set_attn_implementation'
    ):
        generate(model, prompts(1, 40), cache, new=3)


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h.shape,
        lambda h: torch.matmul(torch.zeros(1), h),
        lambda h: h[0],
        lambda h: torch.cat([h, h]),
    ],
)
def test_a_handle_is_not_a_tensor(use) -> None:
    _, handle = filled("cpu", torch.float32, 50)
    with pytest.raises(RuntimeError, match='attn_implementation must be "mustafar"'):
        use(handle)


@pytest.mark.parametrize(
    "option,message",
    [
        ({"softcap": 30.0}, "soft-capped attention scores"),
        ({"s_aux": torch.zeros(6)}, "attention sinks"),
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"dropout": 0.1}, r"model.eval\(\)"),
    ],
)
def test_what_decoding_does_not_compute(option: dict, message: str) -> None:
    _, handle = filled("cpu", torch.float32, 50)
    query = torch.randn(2, 6, 1, 64)
    with pytest.raises(NotImplementedError, match=message):
        mustafar_attention(MODULE, query, handle, handle, None, **option)
    if "dropout" not in option:  # a prefill must not silently go without either
        x = torch.randn(2, 2, 9, 64)
        with pytest.raises(NotImplementedError, match=message):
            mustafar_attention(MODULE, torch.randn(2, 6, 9, 64), x, x, None, **option)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 1, 50),
        torch.ones(2, 1, 1, 49, dtype=torch.bool),
        torch.ones(3, 1, 1, 50, dtype=torch.bool),
        torch.ones(2, 6, 1, 50, dtype=torch.bool),
        torch.ones(2, 50, dtype=torch.bool),
    ],
)
def test_masks_of_another_form(mask: torch.Tensor) -> None:
    _, handle = filled("cpu", torch.float32, 50)
    with pytest.raises(ValueError, match=r"attention_mask: .* takes bool \[2, 1, 1, 50\]"):
        mustafar_attention(MODULE, torch.randn(2, 6, 1, 64), handle, handle, mask)


def test_right_padding_is_an_error_not_wrong_numbers() -> None:
    model = tiny("llama")
    ids = prompts(2, 60)
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    with pytest.raises(ValueError, match=r"batch row 1 masks positions behind visible ones.*padding_side"):
        generate(model, ids, cache_for(model, "kernel"), new=3, attention_mask=mask)


def test_check_verifies_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTAFAR_CHECK", "1")
    _, handle = filled("cpu", torch.float32, 50)
    query = torch.randn(2, 6, 1, 64)
    mustafar_attention(MODULE, query, handle, handle, padded_mask([0, 5], 50))
    with_hole = padded_mask([0, 5], 50)
    with_hole[0, 0, 0, 30] = False
    with pytest.raises(ValueError, match="batch row 0 masks positions"):
        mustafar_attention(MODULE, query, handle, handle, with_hole)


def _mask_arguments(**changes: object) -> dict:
    padding = torch.tensor([[False, True, True, True]])
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4, "q_offset": 0, "kv_offset": 0}
    wanted = {"attention_mask": padding, "dtype": torch.float16, "device": "cpu", "use_vmap": False}
    return {**sizes, **wanted, "mask_function": causal_mask_function, "allow_is_causal_skip": True, **changes}


def test_masks_are_those_of_sdpa() -> None:
    arguments = _mask_arguments()
    if "cache_position" in attention.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"].__code__.co_varnames:
        pytest.skip("transformers before 5.4 takes other arguments")
    expected = attention.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**arguments)
    assert torch.equal(mustafar_mask(**arguments), expected) and expected.shape == (1, 1, 4, 4)


def test_flash_attention_takes_prefills_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: only what would be given to it is checked."""
    assert (
        not attention._mask_for_flash(_mask_arguments(device="cuda")) or attention.is_flash_attn_2_available()
    )
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert attention._mask_for_flash(_mask_arguments(device="cuda"))
    for change in ({"q_length": 1}, {"dtype": torch.float32}, {"use_vmap": True}, {"device": "cpu"}):
        assert not attention._mask_for_flash(_mask_arguments(**{"device": "cuda", **change})), change

    query, mask = torch.randn(2, 6, 5, 64).half(), torch.ones(2, 5, dtype=torch.bool)
    seen = {}

    def flash(q, k, v, padding, **options: object) -> torch.Tensor:
        seen.update(options, q=q, padding=padding)
        return q

    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils._flash_attention_forward", flash, raising=True
    )
    monkeypatch.setattr(attention, "_takes_flash", lambda query, mask: True)
    got, _ = mustafar_attention(MODULE, query, query, query, mask, scaling=0.3, sliding_window=4)
    assert got.shape == (2, 5, 6, 64) and seen["padding"] is mask
    assert seen["attn_implementation"] == "flash_attention_2" and seen["query_length"] == 5
    assert seen["softmax_scale"] == 0.3 and seen["sliding_window"] == 4 and seen["is_causal"] is True


def test_decoding_never_waits_for_the_gpu(target: tuple) -> None:
    """Across a flush, in the uniform layout, with a mask: torch raises at a synchronisation."""
    device, dtype = target
    cache, _ = filled(device, dtype, 150, flush_every=64)
    query = torch.randn(2, 6, 1, 64, device=device, dtype=dtype)
    new = torch.randn(2, 2, 1, 64, device=device, dtype=dtype)
    masks = [padded_mask([0, 5], 151 + step, device) for step in range(100)]
    for step, mask in enumerate(masks):
        if device == "cuda" and step > 0:  # the first step verifies the mask
            torch.cuda.set_sync_debug_mode("error")
        try:
            handle = cache.update(new, new, 0)[0]
            mustafar_attention(MODULE, query, handle, handle, mask)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert cache.layers[0].key_history.packed_tokens == 128
