"""The C++ kernels at every instruction set this machine has, beyond what kernel_wrapper/tests/test_ops.py covers."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from mustafar import num_kept, ops, reference
from mustafar.format import CompressedTensor
from mustafar.testing import accuracy

LEVELS = ("avx512bf16", "avx512", "avx2", "plain")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_DTYPES = DTYPES[:2]


def simd_level() -> str:
    return torch.ops.mustafar.simd_level()


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the inner loops of one instruction set."""
    monkeypatch.setenv("MUSTAFAR_SIMD", request.param)
    if simd_level() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}
    if a.dtype.is_floating_point:
        a, b = (x.contiguous().view(integers[x.element_size()]) for x in (a, b))
    return torch.equal(a, b)


def same_tensor(got: CompressedTensor, expected: CompressedTensor) -> bool:
    got.validate()
    parts = [
        (getattr(got, name), getattr(expected, name)) for name in ("bitmap", "values", "offsets", "widths")
    ]
    return all((a is None and b is None) or same_bits(a, b) for a, b in parts)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every kind of number: NaN of all payloads, infinities, subnormals, both zeros."""
    size = torch.empty(0, dtype=dtype).element_size()
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1), shape, generator=g)
    return bits.to({2: torch.int16, 4: torch.int32}[size]).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 127, 129, 160, 200, 255, 256])
def test_any_head_dim_and_bits(head_dim, dtype):
    x = random_bits((1, 2, 67, head_dim), dtype)
    x[0, 0, ::3] = x[0, 0, ::3, :1]  # ties
    x[0, 1, ::4, head_dim // 2 :] = 0
    for k in sorted({1, (head_dim + 1) // 2, max(1, head_dim - 1), head_dim}):
        got = ops.prune_compress(x, k)
        assert same_tensor(got, reference.prune_compress(x, k))
        assert same_bits(ops.decompress(got), reference.decompress(got))
    got = ops.compress(x)
    assert same_tensor(got, reference.compress(x))
    assert same_bits(ops.decompress(got), torch.where(x != 0, x, 0))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_conversion_of_every_half(dtype, level):
    """1 x value in float32 and back is the value, for all 65,536 of them."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 1, 1, 256)
    got = ops.value_output(torch.ones(256, 1, 1, dtype=dtype), ops.compress(x)).flatten()
    x = torch.where(x == 0, 0, x).flatten()  # a sum that starts at 0 has no -0
    if level == "avx512bf16" and dtype == torch.bfloat16:  # its products take subnormal numbers for zero
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    assert torch.equal(got.isnan(), x.isnan())
    assert same_bits(got[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_rounding_of_results(dtype):
    """Float32 sums are rounded to nearest even, into subnormals and over to infinity."""
    exponents = torch.linspace(-45, 41 if dtype == torch.float16 else 125, 300)
    key = torch.exp2(exponents).to(dtype).view(-1, 1).repeat(1, 2)
    key[:, 1] *= torch.exp2(-torch.arange(300.0).remainder(14)).to(dtype)
    q = torch.tensor([1.0, 1.0]).to(dtype).view(1, 1, 2)
    got = ops.key_scores(q, ops.compress(key.view(1, 1, 300, 2))).flatten()
    assert same_bits(got, key.float().sum(-1).to(dtype))


def test_softmax_over_the_whole_range():
    """Identity values turn the output into the weights: exact to float32, down to subnormals and zero."""
    scores = torch.cat([torch.linspace(-110, 0, 253), torch.tensor([-88.0, -104.5, -1e30])])
    key = torch.zeros(1, 1, 256, 256)
    key[..., 0] = scores
    q = torch.zeros(1, 1, 256)
    q[..., 0] = 1.0
    value, window = torch.eye(256).view(1, 1, 256, 256), torch.zeros(1, 1, 0, 256)
    lengths = torch.tensor([[256, 0]], dtype=torch.int32)
    got = ops.decode_attention(q, ops.compress(key), ops.compress(value), window, window, lengths, scale=1.0)
    torch.testing.assert_close(got.flatten().double(), scores.double().softmax(-1), rtol=1e-6, atol=3e-45)


@functools.cache
def random_case(seed: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """Arguments of decode_attention drawn at random, and what the reference makes of them."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3, 4, 6, 7, 9])
    head_dim, tokens, capacity = (
        rng.choice([16, 64, 80, 128, 256]),
        rng.choice([1, 63, 200, 300, 600]),
        rng.choice([0, 1, 40, 288]),
    )

    def packed() -> CompressedTensor:
        x = torch.randn(batch, heads, tokens, head_dim, generator=g).to(dtype)
        if rng.random() < 0.5:
            return reference.prune_compress(x, num_kept(rng.choice([0, 0.5, 0.7, 0.95]), head_dim))
        return reference.compress(torch.where(x.abs() > rng.random(), x, 0))

    window = torch.randn(2, batch, capacity, heads, head_dim, generator=g).to(dtype).transpose(2, 3)
    lengths = [[rng.randint(0, tokens), rng.randint(0, capacity)] for _ in range(batch)]
    starts = [rng.randint(0, sum(pair)) for pair in lengths]
    case = {
        "q": torch.randn(batch, heads * group, head_dim, generator=g).to(dtype),
        "k": packed(),
        "v": packed(),
        "k_window": window[0],
        "v_window": window[1],
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "starts": rng.choice([None, torch.tensor(starts, dtype=torch.int32)]),
        "sliding_window": rng.choice([0, 0, 5, 300]),
        "scale": rng.choice([None, 1.0, -0.1, 0.0]),
    }
    return case, reference.decode_attention(**case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention_at_random(dtype):
    for seed in range(16):
        case, exact = random_case(seed, dtype)
        result = accuracy(ops.decode_attention(**case), exact.to(dtype), exact)
        assert result.ok, f"seed {seed}: {result}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_as_reference(dtype):
    """Infinities and NaN among keys and values end in NaN exactly where dense attention has them."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 80, generator=g).to(dtype)
    lengths = torch.tensor([[600, 0]], dtype=torch.int32)
    window = torch.zeros(1, 2, 0, 80, dtype=dtype)
    for place in (5, 300, 599):
        for bad in (math.inf, -math.inf, math.nan):
            for which in ("key", "value", "all keys"):
                k, v = torch.randn(2, 1, 2, 600, 80, generator=g).to(dtype)
                rows = slice(None) if which == "all keys" else place
                (v if which == "value" else k)[0, 0, rows, 3] = bad
                args = (q, ops.compress(k), ops.compress(v), window, window, lengths)
                got, exact = ops.decode_attention(*args), reference.decode_attention(*args)
                assert torch.equal(got.isnan(), exact.isnan()), (place, bad, which)
                assert torch.equal(got.isinf(), exact.isinf()), (place, bad, which)


def test_same_bits_for_any_threads_and_batch():
    """Neither the number of threads nor the neighbours in the batch change a result."""
    g = torch.Generator().manual_seed(0)
    k, v = (ops.prune_compress(torch.randn(2, 2, 1500, 64, generator=g), 20) for _ in range(2))
    q, window = torch.randn(2, 6, 64, generator=g), torch.randn(2, 2, 40, 64, generator=g)
    lengths = torch.tensor([[1500, 7], [700, 40]], dtype=torch.int32)
    p = torch.rand(2, 6, 1500, generator=g)

    def run(part: slice = slice(None)) -> list[torch.Tensor]:
        packed = [
            CompressedTensor(c.bitmap[part], c.values[part], None, None, c.tokens, c.head_dim) for c in (k, v)
        ]
        return [
            ops.decode_attention(q[part], *packed, window[part], window[part], lengths[part]),
            ops.key_scores(q[part], packed[0]),
            ops.value_output(p[part], packed[1]),
        ]

    before, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(same_bits(a, b) for a, b in zip(run(), before, strict=True))
    finally:
        torch.set_num_threads(threads)
    alone = run(slice(1, 2))
    assert all(same_bits(a, b[1:]) for a, b in zip(alone, before, strict=True))


def test_stores_beyond_32_bits():
    """Heads further apart than 2^31 values: only the pages in use are ever touched."""
    far, slots = 2**31 + 64, 24 * 64
    try:
        store = torch.empty(far + slots, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    x = store.as_strided((1, 2, 10, 64), (far, far, 64, 1))
    x.copy_(torch.randn(1, 2, 10, 64, generator=torch.Generator().manual_seed(0)))
    packed = ops.prune_compress(x, 20)
    assert same_tensor(packed, reference.prune_compress(x.contiguous(), 20))

    values = store.as_strided(packed.values.shape, (far, far, slots, 512, 8, 1)).copy_(packed.values)
    spread = CompressedTensor(packed.bitmap, values, None, None, 10, 64)
    assert same_bits(ops.decompress(spread), ops.decompress(packed))


def test_lengths_out_of_range_are_an_error():
    x = torch.zeros(1, 1, 70, 64)
    packed, window = ops.prune_compress(x, 8), x[:, :, :5]
    for lengths in ([[129, 0]], [[70, 6]], [[-1, 0]], [[0, -1]]):
        with pytest.raises((RuntimeError, ValueError, IndexError), match="lengths"):
            ops.decode_attention(
                torch.zeros(1, 1, 64),
                packed,
                packed,
                window,
                window,
                torch.tensor(lengths, dtype=torch.int32),
            )


def test_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv("MUSTAFAR_SIMD", "sse9")
    with pytest.raises(
        (RuntimeError, ValueError), match="expected avx512bf16, avx512, avx2 or plain, got sse9"
    ):
        simd_level()
    monkeypatch.setenv("MUSTAFAR_SIMD", "")
    assert simd_level() in LEVELS
