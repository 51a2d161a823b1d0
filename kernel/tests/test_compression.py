"""Every implementation of prune_compress, compress and decompress against the reference, bit for bit.

Triton runs under its interpreter where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from mustafar import num_kept, reference
from mustafar.format import CompressedTensor

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPS = ("prune_compress", "compress", "decompress")
importlib.import_module("mustafar.ops")  # registers torch.ops.mustafar


@pytest.fixture(params=["triton", "cpu", pytest.param("cuda", marks=GPU)])
def compression(request):
    """The three functions of one implementation, for tensors on `device`."""
    if request.param != "triton":
        functions = {name: getattr(torch.ops.mustafar, name) for name in OPS}
        return SimpleNamespace(device=request.param, **functions)
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        pytest.skip("Triton compiles, and there is no GPU")
    from mustafar.kernel import compression

    device = "cpu" if triton.knobs.runtime.interpret else "cuda"
    return SimpleNamespace(device=device, **{name: getattr(compression, name) for name in OPS})


def special_rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random rows with all that is awkward in the first few: ties, zeros, runs, NaN, inf, subnormals."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    last = shape[3] - 1
    x[0, 0, 0] = 0
    x[0, 0, 1] = 1.0
    x[0, 0, 2, 3:9] = math.nan
    x[0, 0, 3, last] = -math.nan
    x[0, 0, 4, 5:40] = -math.inf
    x[0, 0, 5, :last] = 0  # a run of zeros before one value
    x[0, 0, 6] = -0.0
    x[0, 0, 7, 30] = torch.finfo(dtype).smallest_normal / 2
    return x


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.dtype.is_floating_point:
        got, expected = reference.as_bits(got), reference.as_bits(expected)
    return got.dtype == expected.dtype and torch.equal(got.cpu(), expected)


def same_pruned(compression, x: torch.Tensor, kept: int) -> bool:
    bitmap, values = compression.prune_compress(x, kept)
    expected = reference.prune_compress(x.cpu(), kept)
    return same_bits(bitmap, expected.bitmap) and same_bits(values, expected.values)


def same_compressed(compression, x: torch.Tensor) -> bool:
    """And back again, from both layouts."""
    tokens, head_dim = x.shape[2:]
    got = CompressedTensor(*compression.compress(x), tokens, head_dim).validate()
    expected = reference.compress(x.cpu())
    parts = ("bitmap", "values", "offsets", "widths")
    same = [same_bits(getattr(got, part), getattr(expected, part)) for part in parts]
    dense = compression.decompress(got.bitmap, got.values, got.offsets, got.widths, tokens, head_dim)
    uniform = reference.prune_compress(x.cpu(), (head_dim + 1) // 2)
    bitmap, values = uniform.bitmap.to(x.device), uniform.values.to(x.device)
    half = compression.decompress(bitmap, values, None, None, tokens, head_dim)
    same += [same_bits(dense, reference.decompress(expected)), same_bits(half, reference.decompress(uniform))]
    return all(same)


SHAPES = [(1, 2, 65, 64), (1, 1, 64, 128), (2, 1, 30, 80), (1, 1, 20, 256), (1, 1, 10, 100), (1, 1, 10, 192)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prune_compress(compression, shape, dtype):
    x = special_rows(shape, dtype).to(compression.device)
    for sparsity in (0.0, 0.5, 0.7, 0.98):
        assert same_pruned(compression, x, num_kept(sparsity, shape[3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ties_of_every_length(compression, dtype):
    """Any number of equal magnitudes, any number of them kept: the lowest channels win."""
    g = torch.Generator().manual_seed(1)
    for head_dim in (96, 128, 200):
        x = torch.randint(-2, 3, (1, 1, 64, head_dim), generator=g).to(dtype).to(compression.device)
        for kept in (1, head_dim // 4, head_dim // 2, head_dim - 1):
            assert same_pruned(compression, x, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compress_and_decompress(compression, shape, dtype):
    x = special_rows(shape, dtype)
    x[0, 0, 8:] = torch.where(torch.rand(x[0, 0, 8:].shape) < 0.3, x[0, 0, 8:], 0)
    assert same_compressed(compression, x.to(compression.device))


def test_many_slices(compression):
    """More slices than a scan of their sizes takes in one go, most of them empty."""
    if compression.device == "cpu":
        pytest.skip("sizes are summed in a plain loop on a CPU, and Triton's interpreter would take minutes")
    x = torch.zeros(3, 4, 64 * 1000, 8, dtype=torch.float16, device=compression.device)
    x[:, :, ::111, 3] = 1.0
    bitmap, values, offsets, widths = compression.compress(x)
    sizes = widths.long().flatten() * 64
    assert torch.equal(offsets.flatten(), sizes.cumsum(0) - sizes) and values.numel() == int(sizes.sum())
    assert torch.equal(compression.decompress(bitmap, values, offsets, widths, *x.shape[2:]), x)


@pytest.mark.parametrize("head_dim", [7, 64, 100, 128, 130])
def test_strided_and_unaligned(compression, head_dim, request):
    if "triton" in request.node.callspec.id and compression.device == "cuda" and head_dim != 100:
        pytest.skip("compiles anew for every stride; the interpreter runs all of them")
    x = torch.randn(1, 40, 2, head_dim).half().to(compression.device).transpose(1, 2)
    assert same_pruned(compression, x, (head_dim + 2) // 3)
    buffer = torch.randn(2 * 70 * (head_dim + 8) + 1).half().to(compression.device)
    for start, pitch in ((1, head_dim), (0, head_dim + 1), (1, head_dim + 8)):
        x = buffer[start:].as_strided((1, 2, 70, head_dim), (0, 70 * pitch, pitch, 1))
        assert same_pruned(compression, x, (head_dim + 2) // 3)
        assert same_compressed(compression, x)


def test_unaligned_values(compression):
    """decompress of values that do not begin at a multiple of 16 bytes."""
    c = reference.prune_compress(torch.randn(1, 1, 70, 128).half(), 39)
    shifted = torch.cat([torch.zeros(1, dtype=torch.half), c.values.flatten()]).to(compression.device)
    bitmap, values = c.bitmap.to(compression.device), shifted[1:].view(c.values.shape)
    dense = compression.decompress(bitmap, values, None, None, 70, 128)
    assert same_bits(dense, reference.decompress(c))


def test_empty(compression):
    x = torch.zeros(1, 2, 0, 64, dtype=torch.half, device=compression.device)
    bitmap, values = compression.prune_compress(x, 20)
    assert bitmap.shape == (1, 2, 0, 64, 1) and values.shape == (1, 2, 0, 3, 64, 8)
    bitmap, values, offsets, widths = compression.compress(x)
    assert values.numel() == 0 and offsets.shape == widths.shape == (1, 2, 0)
    assert compression.decompress(bitmap, values, offsets, widths, 0, 64).shape == x.shape


def test_bad_arguments(compression):
    x = torch.zeros(1, 1, 4, 64, dtype=torch.float16, device=compression.device)
    with pytest.raises(ValueError, match="k: expected 1 to 64"):
        compression.prune_compress(x, 65)
    with pytest.raises(TypeError, match=r"x\.dtype"):
        compression.prune_compress(x.double(), 3)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        compression.compress(x.transpose(2, 3))
