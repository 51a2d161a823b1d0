"""Inputs that mean something, and the tolerance they are held to. Shared by the tests of ops and kernels."""

from __future__ import annotations

import torch
from mustafar import reference
from mustafar.format import CompressedTensor
from mustafar.testing import accuracy

PATTERNS = ("normal", "outliers", "ties", "zeros", "long_runs", "one_word", "full_and_empty")


def rows(pattern: str, batch: int, heads: int, tokens: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    """float32 [B, H, T, D] rows of a named pattern."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, tokens, head_dim, generator=g)
    channel = torch.arange(head_dim)
    if pattern == "outliers":  # a few channels dominate, as keys do
        x[..., :: max(1, head_dim // 5)] *= 30
    elif pattern == "ties":  # every magnitude is one of three
        x = x.sign() * torch.randint(1, 4, x.shape, generator=g) / 2
    elif pattern == "zeros":
        x = x * 0
    elif pattern == "long_runs":  # nothing but the last channel, and rows with one early and one late value
        x = torch.where(channel == head_dim - 1, x, 0.0)
        x[:, :, ::3, 0] = 1.5
    elif pattern == "one_word":  # all non-zeros of a row inside one 32-channel word
        word = torch.randint(0, max(1, head_dim // 32), (batch, heads, tokens, 1), generator=g)
        x = torch.where(channel // 32 == word, x, 0.0)
    elif pattern == "full_and_empty":
        x[:, :, 1::4] = 0.0
        x[:, :, 2::4] = torch.where(torch.rand(x[:, :, 2::4].shape, generator=g) < 0.3, x[:, :, 2::4], 0.0)
    return x


def compressed(x: torch.Tensor, layout: str, kept: int, device: str | torch.device) -> CompressedTensor:
    """x packed by the reference: 'uniform' prunes to `kept` per row, 'general' keeps all non-zeros."""
    c = reference.prune_compress(x, kept) if layout == "uniform" else reference.compress(x)
    return c.to(device)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, NaN payloads and the sign of zero included."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype.is_floating_point:
        got, expected = reference.as_bits(got.contiguous()), reference.as_bits(expected.contiguous())
    assert torch.equal(got.cpu(), expected.cpu())


def assert_as_accurate(got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is at most twice as far from `exact` (float32) as PyTorch's own result in the same dtype."""
    assert torch.isfinite(exact).all()
    result = accuracy(got, same_dtype, exact)
    assert result.ok, str(result)
