"""What a sequence may not see never shows, whatever lies there: padding, past lengths, outside the sliding window."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from decode_steps import (
    HALF,
    LAYOUTS,
    assert_accurate,
    in_float32,
    on_each_target,
    packed,
    randn,
    sdpa,
    step,
    with_garbage,
)
from mustafar import ops, reference
from mustafar.format import CompressedTensor, slices_for

SLIDING = (0, 1, 33, 64, 100, 1000)
TOKENS, WINDOW, HEAD_DIM, KEPT = 330, 96, 64, (20, 32)  # what the stores here have room for


def sequences(seed: int) -> list[tuple[int, int, int]]:
    """(compressed tokens, window tokens, first visible position), around all edges."""
    special = [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 5, 5), (0, 70, 64), (64, 0, 63), (64, 0, 64), (64, 1, 64),
        (65, 0, 64), (130, 3, 5), (200, 40, 64), (200, 40, 128), (200, 40, 199), (200, 40, 200), (200, 40, 239),
        (200, 40, 240), (200, 40, 1000), (330, 96, 0), (330, 96, 300), (330, 0, 320), (320, 96, 321),
    ]  # fmt: skip
    rng = random.Random(seed)
    for _ in range(10):
        compressed, recent = rng.randint(0, TOKENS), rng.randint(0, WINDOW)
        special.append((compressed, recent, rng.randint(0, compressed + recent)))
    return special


def hidden_and_clean(
    device: str, dtype: torch.dtype, layouts: tuple[str, str], sliding: int
) -> tuple[dict, dict]:
    """The same step twice: with NaN, infinities and garbage wherever nothing is visible, and without."""
    cases = sequences(sliding)
    lengths = torch.tensor([case[:2] for case in cases], dtype=torch.int32)
    starts = torch.tensor([case[2] for case in cases], dtype=torch.int32)
    seen = reference.visible(lengths, starts, sliding, TOKENS + WINDOW)
    seen_in_window = torch.stack(
        [row[n : n + WINDOW] for row, n in zip(seen, lengths[:, 0].tolist(), strict=True)]
    )
    seen_compressed = seen[:, :TOKENS] & (torch.arange(TOKENS) < lengths[:, :1])
    garbage = torch.tensor([math.nan, math.inf, -math.inf])

    def spoiled(x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        junk = garbage.repeat(x.shape[2])[: x.shape[2], None].to(x)
        return torch.where(visible[:, None, :, None].to(device), x, junk)

    batch = len(cases)
    clean = {"q": randn(batch, 6, HEAD_DIM, device=device, dtype=dtype, seed=9), "sliding_window": sliding}
    clean |= {"lengths": lengths.to(device), "starts": starts.to(device)}
    hidden = dict(clean)
    for seed, (name, layout, kept) in enumerate(zip("kv", layouts, KEPT, strict=True)):
        x = randn(batch, 2, TOKENS, HEAD_DIM, device=device, dtype=dtype, seed=seed)
        clean[name] = packed(x, layout, kept)
        keep = reference.keep_mask(clean[name]) | ~seen_compressed[:, None, :, None].to(device)
        junk = spoiled(x, seen_compressed)
        # In the uniform layout the hidden rows hold as many values as the others, in the general one all of them.
        spoilt = (
            reference.compress(torch.where(keep, junk, 0))
            if layout == "general"
            else packed_as(clean[name], junk)
        )
        hidden[name] = with_garbage(spoilt, lengths[:, 0].tolist())
        window = randn(batch, 2, WINDOW, HEAD_DIM, device=device, dtype=dtype, seed=seed + 5)
        clean[f"{name}_window"] = window
        hidden[f"{name}_window"] = spoiled(window, seen_in_window)
    return hidden, clean


def packed_as(c: CompressedTensor, x: torch.Tensor) -> CompressedTensor:
    """The values of x at the channels that `c` keeps."""
    return reference.pack(x, reference.keep_mask(c), c.values.shape[3] * 8)


@pytest.mark.parametrize("sliding", SLIDING)
@on_each_target
def test_hidden_positions_never_show(device, dtype, sliding):
    """32 sequences at once: padding up to whole slices, nothing visible, lengths from 0 to all there is room for."""
    pairs = list(itertools.product(LAYOUTS, LAYOUTS))
    for layouts in pairs if device == "cuda" else [pairs[HALF.index(dtype) + 1]]:
        hidden, clean = hidden_and_clean(device, dtype, layouts, sliding)
        got, expected, peer = ops.decode_attention(**hidden), in_float32(clean), sdpa(clean)
        for b, case in enumerate(sequences(sliding)):
            assert_accurate(got[b], peer[b], expected[b], (layouts, case))
        empty = clean["starts"] >= clean["lengths"].sum(-1)
        assert empty.sum() >= 5
        assert not got[empty].any(), "a sequence that sees nothing gives zeros"


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_target
def test_slices_before_the_first_visible_token_are_not_read(device, dtype, layout):
    """Garbage in slices that padding hides as a whole."""
    args = step(device, dtype, tokens=300, layouts=(layout, layout), starts=[130, 0], sliding_window=0)
    expected = ops.decode_attention(**args)
    for name in "kv":
        c = args[name]
        values, bitmap = c.values.clone(), c.bitmap
        if c.is_uniform:
            values[0, :, :2] = math.nan
        else:
            for start, width in zip(c.offsets[0, :, :2].flatten(), c.widths[0, :, :2].flatten(), strict=True):
                values[start : start + 64 * width] = math.nan
        args[name] = dataclasses.replace(c, values=values, bitmap=bitmap)
    assert torch.equal(ops.decode_attention(**args), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_target
def test_spmv_of_part_of_a_store(device, dtype, layout):
    """`tokens` inside a slice of a store that goes on: what follows is neither scored nor weighed."""
    tokens = 130
    x = randn(2, 2, 400, 128, device=device, dtype=dtype)
    whole = packed(x, layout, 39)
    spoilt = x.clone()
    spoilt[:, :, tokens:] = math.nan
    keep = reference.keep_mask(whole)
    spoilt = reference.pack(spoilt, keep, 40) if layout == "uniform" else reference.pack(spoilt, keep, None)
    part = dataclasses.replace(with_garbage(spoilt, [tokens] * 2), tokens=tokens)
    alone = dataclasses.replace(whole, tokens=tokens, **{
        n: getattr(whole, n)[:, :, : slices_for(tokens)]
        for n in (("bitmap", "values") if whole.is_uniform else ("bitmap", "offsets", "widths"))
    })  # fmt: skip
    q = randn(2, 8, 128, device=device, dtype=dtype, seed=1)
    p = randn(2, 8, tokens, device=device, dtype=dtype, seed=2)
    dense = reference.decompress(alone).repeat_interleave(4, 1)
    peer = torch.einsum("bhd,bhtd->bht", q, dense)
    assert_accurate(ops.key_scores(q, part), peer, reference.key_scores(q, alone))
    peer = torch.einsum("bht,bhtd->bhd", p, dense)
    assert_accurate(ops.value_output(p, part), peer, reference.value_output(p, alone))


@on_each_target
def test_no_sequences(device, dtype):
    args = step(device, dtype, batch=1)
    for name in ("q", "k_window", "v_window", "lengths"):
        args[name] = args[name][:0]
    for name in "kv":
        c = args[name]
        args[name] = dataclasses.replace(c, bitmap=c.bitmap[:0], values=c.values[:0])
    assert ops.decode_attention(**args).shape == (0, 8, 128)
