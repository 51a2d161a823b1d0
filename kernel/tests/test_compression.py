"""The Triton kernels under Triton's interpreter, so that they are tested where there is no GPU.

On a GPU the compiled kernels are held to the same reference by kernel_wrapper/tests/test_ops.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from mustafar import num_kept, reference
from mustafar.format import CompressedTensor

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="compiled for the GPU here: kernel_wrapper/tests/test_ops.py tests that",
)


@pytest.fixture(scope="module")
def compression():
    from mustafar.kernel import compression

    return compression


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
    return got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 65, 64), (1, 1, 64, 128), (2, 1, 30, 80), (1, 1, 10, 256)], ids=str)
def test_prune_compress(compression, shape, dtype):
    x = special_rows(shape, dtype)
    for sparsity in (0.0, 0.5, 0.7, 0.98):
        kept = num_kept(sparsity, shape[3])
        bitmap, values = compression.prune_compress(x, kept)
        expected = reference.prune_compress(x, kept)
        assert same_bits(bitmap, expected.bitmap)
        assert same_bits(values, expected.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 65, 64), (1, 1, 64, 128), (2, 1, 30, 80)], ids=str)
def test_compress_and_decompress(compression, shape, dtype):
    x = special_rows(shape, dtype)
    x[0, 0, 8:] = torch.where(torch.rand(x[0, 0, 8:].shape) < 0.3, x[0, 0, 8:], 0)
    expected = reference.compress(x)
    got = CompressedTensor(*compression.compress(x), shape[2], shape[3]).validate()
    for part in ("bitmap", "values", "offsets", "widths"):
        assert same_bits(getattr(got, part), getattr(expected, part))
    dense = compression.decompress(got.bitmap, got.values, got.offsets, got.widths, *shape[2:])
    assert same_bits(dense, reference.decompress(expected))
    uniform = reference.prune_compress(x, shape[3] // 2)
    dense = compression.decompress(uniform.bitmap, uniform.values, None, None, *shape[2:])
    assert same_bits(dense, reference.decompress(uniform))


def test_empty_and_strided(compression):
    x = torch.randn(1, 40, 2, 64).half().transpose(1, 2)
    bitmap, values = compression.prune_compress(x, 20)
    expected = reference.prune_compress(x, 20)
    assert same_bits(bitmap, expected.bitmap) and same_bits(values, expected.values)
    bitmap, values = compression.prune_compress(x[:, :, :0], 20)
    assert bitmap.shape == (1, 2, 0, 64, 1) and values.shape == (1, 2, 0, 3, 64, 8)
    assert compression.compress(x[:, :, :0])[1].numel() == 0


def test_bad_arguments(compression):
    x = torch.zeros(1, 1, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="k: expected 1 to 64"):
        compression.prune_compress(x, 65)
    with pytest.raises(TypeError, match=r"x\.dtype"):
        compression.prune_compress(x.float(), 3)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        compression.compress(x.transpose(2, 3))
