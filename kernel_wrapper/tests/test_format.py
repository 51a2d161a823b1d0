"""Property tests of the format: any length, head dim, pattern and dtype survives the round trip exactly."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mustafar import CompressedTensor, num_kept, ops, reference
from mustafar.format import popcount, slices_for, width_for

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
HEAD_DIMS = st.sampled_from([1, 8, 63, 64, 65, 80, 96, 112, 128, 192, 255, 256])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[B, Hkv, T, D] of random bits: every NaN, infinity, zero and subnormal of the dtype can occur."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 140)), draw(HEAD_DIMS))
    dtype = draw(DTYPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    kind = draw(st.sampled_from(["bits", "normal", "ties", "sparse", "full_and_empty", "runs"]))
    if kind == "bits":
        info = torch.iinfo(integer)
        return torch.randint(info.min, info.max, shape, generator=g, dtype=integer).view(dtype)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = x.round()
    elif kind == "sparse":
        x = torch.where(torch.rand(shape, generator=g) < draw(st.floats(0, 1)), x, 0)
    elif kind == "full_and_empty":
        x[:, :, ::2] = 0
    elif kind == "runs":
        x[..., : shape[3] - 1] = 0
    return x.to(dtype)


@settings(max_examples=80, deadline=None)
@given(x=tensors())
def test_general_round_trip(x):
    expected = torch.where(x != 0, reference.as_bits(x), 0).view(x.dtype)
    for module in (reference, ops):
        c = module.compress(x).validate()
        assert_same_bits(reference.decompress(c), expected)
        assert_same_bits(ops.decompress(c), expected)
        assert c.shape == x.shape


@settings(max_examples=80, deadline=None)
@given(x=tensors(), sparsity=st.floats(0, 0.99))
def test_uniform_round_trip(x, sparsity):
    kept = num_kept(sparsity, x.shape[3])
    keep = reference.magnitude_keep(x, kept)
    expected = torch.where(keep, reference.as_bits(x), 0).view(x.dtype)
    for module in (reference, ops):
        c = module.prune_compress(x, kept).validate()
        assert torch.equal(reference.keep_mask(c), keep)
        assert_same_bits(ops.decompress(c), expected)
        assert c.values.shape[3] * 8 == width_for(kept)
    if x.shape[2]:
        assert (popcount(c.bitmap).sum(-1).flatten(2)[:, :, : x.shape[2]] == kept).all()


@settings(max_examples=60, deadline=None)
@given(x=tensors(), sparsity=st.floats(0, 0.99))
def test_magnitude_keep_against_sorting_by_hand(x, sparsity):
    """The kept set of a row is what Python's own stable sort picks from (is NaN, magnitude, channel)."""
    kept = num_kept(sparsity, x.shape[3])
    keep = reference.magnitude_keep(x, kept)
    for row, picked in list(zip(x.flatten(0, 2).tolist(), keep.flatten(0, 2).tolist(), strict=True))[:4]:
        order = sorted(
            range(len(row)), key=lambda c: (row[c] == row[c], -abs(row[c]) if row[c] == row[c] else 0, c)
        )
        assert {c for c, p in enumerate(picked) if p} == set(order[:kept])


@settings(max_examples=20, deadline=None)
@given(x=tensors())
def test_state_dict_round_trip(x):
    for c in (reference.compress(x), reference.prune_compress(x, x.shape[3])):
        again = CompressedTensor.from_state_dict(c.state_dict())
        assert_same_bits(reference.decompress(again), reference.decompress(c))


def test_sizes_of_the_paper_shapes():
    """FORMAT.md's figures: bytes per row at head dim 128, of 256 dense."""
    x = torch.zeros(1, 1, 64, 128, dtype=torch.float16)
    for sparsity, kept, share in ((0.5, 64, 0.5625), (0.7, 39, 0.375)):
        assert num_kept(sparsity, 128) == kept
        c = ops.prune_compress(x, kept)
        assert c.nbytes == share * c.dense_nbytes == share * x.nbytes


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "0.5", True, None])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        num_kept(sparsity, 128)


@settings(max_examples=200, deadline=None)
@given(hundredths=st.integers(0, 99), head_dim=st.integers(1, 256))
def test_num_kept_is_exact_in_decimal(hundredths, head_dim):
    assert num_kept(hundredths / 100, head_dim) == head_dim - hundredths * head_dim // 100


def broken() -> dict[str, CompressedTensor]:
    x = torch.randn(1, 2, 70, 80, generator=torch.Generator().manual_seed(0)).half()
    x[:, :, 64:] = 0
    u, g = reference.prune_compress(x, 20), reference.compress(x)
    bit_past_end = u.bitmap.clone()
    bit_past_end[0, 0, 0, 0, 1] |= 1 << 20
    row_past_end = u.bitmap.clone()
    row_past_end[0, 0, 1, 63, 0] = 1
    end_wraps = g.offsets.clone()
    end_wraps[0, 0, 0] = 2**63 - 8
    overfull = u.bitmap.clone()
    overfull[0, 0, 0, 0, 0] = -1
    swap = dataclasses.replace
    return {
        "bitmap: expected no bits past channel 79": swap(u, bitmap=bit_past_end),
        "bitmap: expected empty rows past token 69": swap(u, bitmap=row_past_end),
        "bitmap: expected at most 24": swap(u, bitmap=overfull),
        "bitmap.dtype": swap(u, bitmap=u.bitmap.int()),
        "bitmap.shape": swap(u, tokens=10),
        "values.shape": swap(u, values=u.values[:, :, :1]),
        "values.dtype": swap(u, values=u.values.double()),
        "offsets and widths": swap(g, widths=None),
        "widths.dtype": swap(g, widths=g.widths.long()),
        "widths: expected multiples of 8": swap(g, widths=g.widths + 1),
        "widths: expected at least": swap(g, widths=g.widths * 0),
        "offsets: expected": swap(g, offsets=g.offsets + 8),
        "offsets: expected multiples": swap(g, offsets=end_wraps),
        "offsets.shape": swap(g, offsets=g.offsets[:, :1], widths=g.widths[:, :1]),
        "head_dim": swap(u, head_dim=300),
    }


@pytest.mark.parametrize("message", broken())
def test_validate_names_what_is_wrong(message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        broken()[message].validate()


def test_from_state_dict_missing_part():
    state = reference.compress(torch.zeros(1, 1, 1, 8)).state_dict()
    del state["bitmap"]
    with pytest.raises(ValueError, match="missing \\['bitmap'\\]"):
        CompressedTensor.from_state_dict(state)


def test_format_md_worked_example():
    """The numbers printed in kernel/FORMAT.md are what the packer makes."""
    text = (Path(__file__).parents[2] / "kernel" / "FORMAT.md").read_text()
    row = torch.zeros(64)
    row[[0, 3, 5, 6, 33, 62]] = torch.tensor([0.5, -2.0, 1.0, 0.25, -4.0, 3.0])
    row[[1, 40]] = torch.tensor([-0.125, 0.0625])
    x = torch.zeros(1, 1, 2, 64, dtype=torch.float16)
    x[0, 0, 1] = row.half()
    c = reference.prune_compress(x, 6)
    word = int(c.bitmap[0, 0, 0, 1, 0]) & (2**64 - 1)
    assert f"0x{word:016x}" in text
    hexes = [f"{int(v) & 0xFFFF:04x}" for v in reference.as_bits(c.values)[0, 0, 0, 0, 1]]
    assert " ".join(hexes) in text
    assert slices_for(2) == 1 and c.values.shape == (1, 1, 1, 1, 64, 8)
