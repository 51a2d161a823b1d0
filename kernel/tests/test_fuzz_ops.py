"""Generated cases of every op, layout, dtype and instruction set against `mustafar.reference`.

A case is drawn from its number alone, so that a failure names what to run again. MUSTAFAR_FUZZ_CASES says how many
there are in all (480 by default, some seconds; a nightly run takes 10,000 and more), MUSTAFAR_FUZZ_FIRST where they
start.
"""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch
from cases import PATTERNS, assert_same_bits, rows
from decode_steps import sdpa
from mustafar import ops, reference
from mustafar.format import SLICE_TOKENS, CompressedTensor, width_for
from mustafar.testing import accuracy

LEVELS = ("avx512bf16", "avx512", "avx2", "plain")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPS = ("prune_compress", "compress", "decompress", "key_scores", "value_output", "decode_attention")
CASES = int(os.environ.get("MUSTAFAR_FUZZ_CASES", "480"))
FIRST = int(os.environ.get("MUSTAFAR_FUZZ_FIRST", "0"))
BATCHES = 4  # tests of one op at one level


class Draw:
    """Everything random in one case."""

    def __init__(self, op: str, level: str, number: int) -> None:
        self.rng = random.Random(f"{op} {level} {number}")
        self.g = torch.Generator().manual_seed(self.rng.getrandbits(60))
        one_of = self.rng.choice
        self.dtype = one_of(DTYPES)
        self.batch, self.heads = one_of([1, 1, 2, 3]), one_of([1, 2, 3])
        self.group = one_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
        # Every width of the last group of channels, and those models have.
        self.head_dim = one_of([64, 80, 96, 112, 128, 256, self.rng.randint(1, 256)])
        self.tokens = one_of([1, 63, 64, 65, 128, self.rng.randint(1, 330)])

    def dense(self, finite: bool = True) -> torch.Tensor:
        """[B, Hkv, T, D] of a named pattern or, where it need not be finite, of any bits; maybe strided."""
        shape = (self.batch, self.heads, self.tokens, self.head_dim)
        if not finite and self.rng.random() < 0.3:
            size = self.dtype.itemsize
            bits = torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1), shape, generator=self.g)
            x = bits.to({2: torch.int16, 4: torch.int32}[size]).view(self.dtype)
        else:
            x = rows(self.rng.choice(PATTERNS), *shape, seed=self.rng.getrandbits(30)).to(self.dtype)
        return self.strided(x)

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        """x or the same in a larger tensor, in another order of dimensions; its last dim stays contiguous."""
        if self.rng.random() < 0.5:
            return x
        order = self.rng.sample(range(x.dim() - 1), x.dim() - 1)
        room = torch.full([x.shape[i] + self.rng.randint(0, 1) for i in order] + [x.shape[-1] + 3], torch.nan)
        room = room.to(x.dtype).permute([order.index(i) for i in range(x.dim() - 1)] + [x.dim() - 1])
        return room[tuple(slice(0, size) for size in x.shape)].copy_(x)

    def packed(self) -> CompressedTensor:
        """Finite rows packed by the reference, in either layout, and where views may lie."""
        x = self.dense()
        if self.rng.random() < 0.5:
            kept = self.rng.choice([1, self.head_dim, self.rng.randint(1, self.head_dim)])
            c = reference.pack(x, reference.magnitude_keep(x, kept), width_for(kept))
            return c if self.rng.random() < 0.5 else self.in_store(c)
        keep = torch.rand(x.shape, generator=self.g) < self.rng.choice([0.0, 0.1, 0.3, 0.5, 1.0])
        return self.moved(reference.pack(x, keep & (x != 0), None))

    def in_store(self, c: CompressedTensor) -> CompressedTensor:
        """Slices of a store that has room for more; what lies there is garbage."""

        def cut(x: torch.Tensor, garbage: float) -> torch.Tensor:
            shape = (x.shape[0], x.shape[1] + 1, x.shape[2] + 2, *x.shape[3:])
            room = torch.full(shape, garbage, dtype=x.dtype)
            return room[:, : x.shape[1], 1 : x.shape[2] + 1].copy_(x)

        return dataclasses.replace(c, bitmap=cut(c.bitmap, -1), values=cut(c.values, torch.nan))

    def moved(self, c: CompressedTensor) -> CompressedTensor:
        """Slices of the general layout in another order, with gaps of garbage between them."""
        places = list(range(c.offsets.numel()))
        self.rng.shuffle(places)
        offsets, pieces, used = c.offsets.clone(), [], 0
        for place in places:
            gap = 8 * self.rng.randint(0, 2)
            start, size = int(c.offsets.flatten()[place]), int(c.widths.flatten()[place]) * SLICE_TOKENS
            pieces += [torch.full((gap,), torch.nan, dtype=c.dtype), c.values[start : start + size]]
            offsets.view(-1)[place] = used + gap
            used += gap + size
        return dataclasses.replace(c, values=torch.cat(pieces), offsets=offsets)

    def queries(self, length: int, heads: int) -> torch.Tensor:
        x = torch.randn(self.batch, heads * self.group, length, generator=self.g).to(self.dtype)
        return self.strided(x)


def same(got: CompressedTensor, expected: CompressedTensor) -> None:
    got.validate()
    assert (got.tokens, got.head_dim) == (expected.tokens, expected.head_dim)
    for part in ("bitmap", "values", "offsets", "widths"):
        ours, theirs = getattr(got, part), getattr(expected, part)
        assert (ours is None) == (theirs is None), part
        if ours is not None:
            assert_same_bits(ours, theirs)


def close(got: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor) -> None:
    result = accuracy(got, peer, exact)
    assert result.ok, str(result)


def prune_compress(draw: Draw) -> None:
    x = draw.dense(finite=False)
    kept = draw.rng.choice([1, draw.head_dim, draw.rng.randint(1, draw.head_dim)])
    same(ops.prune_compress(x, kept), reference.prune_compress(x, kept))


def compress(draw: Draw) -> None:
    x = draw.dense(finite=False)
    got = ops.compress(x)
    same(got, reference.compress(x))
    assert_same_bits(ops.decompress(got), torch.where(x != 0, x, 0))


def decompress(draw: Draw) -> None:
    c = draw.packed()
    assert_same_bits(ops.decompress(c), reference.decompress(c))


def key_scores(draw: Draw) -> None:
    c = draw.packed()
    q = draw.queries(c.head_dim, c.shape[1])
    dense = reference.decompress(c).repeat_interleave(draw.group, 1)
    close(ops.key_scores(q, c), torch.einsum("bhd,bhtd->bht", q, dense), reference.key_scores(q, c))


def value_output(draw: Draw) -> None:
    c = draw.packed()
    p = draw.queries(c.tokens, c.shape[1]).softmax(-1)
    dense = reference.decompress(c).repeat_interleave(draw.group, 1)
    close(ops.value_output(p, c), torch.einsum("bht,bhtd->bhd", p, dense), reference.value_output(p, c))


def decode_attention(draw: Draw) -> None:
    k, v = draw.packed(), draw.packed()
    capacity = draw.rng.choice([0, 1, 33, 288])
    window = torch.randn(2, draw.batch, draw.heads, capacity, draw.head_dim, generator=draw.g).to(draw.dtype)
    lengths = [
        [draw.rng.choice([0, draw.tokens, draw.rng.randint(0, draw.tokens)]), draw.rng.randint(0, capacity)]
        for _ in range(draw.batch)
    ]
    starts = [draw.rng.randint(0, sum(pair)) for pair in lengths]
    case = {
        "q": draw.queries(draw.head_dim, draw.heads),
        "k": k,
        "v": v,
        "k_window": draw.strided(window[0]),
        "v_window": draw.strided(window[1]),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "starts": draw.rng.choice([None, torch.tensor(starts, dtype=torch.int32)]),
        "sliding_window": draw.rng.choice([0, 0, 1, draw.rng.randint(1, 400)]),
        "scale": draw.head_dim**-0.5 * draw.rng.choice([1.0, 1.0, 0.0, -1.0]),
    }
    exact = reference.decode_attention(**case)
    got = ops.decode_attention(**case)
    close(got, sdpa(case) if int(case["lengths"].sum(-1).max()) > 0 else exact, exact)


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", OPS)
def test_fuzz(op: str, level: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTAFAR_SIMD", level)
    if torch.ops.mustafar.simd_level() != level:
        pytest.skip(f"this machine has no {level}")
    count = -(-CASES // (len(OPS) * len(LEVELS)))
    for number in range(FIRST + batch, FIRST + count, BATCHES):
        try:
            globals()[op](Draw(op, level, number))
        except Exception as error:
            error.add_note(f"case {number} of {op} at {level}")
            raise
