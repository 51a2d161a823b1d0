"""Dense attention and matrix products in PyTorch, and a clock: what the kernels are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def host_ms(call: Callable[[], object], budget_ms: float = 500.0) -> list[float]:
    """Milliseconds of calls on the host after one to warm up: 5 to 200 of them, for about `budget_ms`."""
    call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def group_rows(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """x [B, H, ...] as [B, Hkv, G, ...]: the queries of a group become rows, so that one read of K serves them."""
    return x.unflatten(1, (kv_heads, -1))


def dense_scores(rows: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """rows [B, Hkv, G, D] times k [B, Hkv, T, D]: [B, H, T]."""
    return (rows @ k.transpose(2, 3)).flatten(1, 2)


def dense_output(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p [B, H, T] times v [B, Hkv, T, D]: [B, H, D]."""
    return (group_rows(p, v.shape[1]) @ v).flatten(1, 2)


def sdpa(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of rows [B, Hkv, G, D] over k and v [B, Hkv, T, D]: [B, H, D]."""
    return F.scaled_dot_product_attention(rows, k, v).flatten(1, 2)


def matmul_attention(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two matrix products and a softmax, shapes as in `sdpa`: on a CPU often faster than SDPA."""
    scores = (rows @ k.transpose(2, 3)) * k.shape[-1] ** -0.5
    return (scores.float().softmax(-1).to(v.dtype) @ v).flatten(1, 2)
