"""The data of one shape, made on the device, and float32 results on a small part of it to check against."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from mustafar import CompressedTensor, num_kept, ops, reference
from mustafar.testing import Accuracy, accuracy

from ..dense import dense_output, dense_scores, group_rows, matmul_attention, sdpa
from .shapes import Shape


class Problem:
    """Random queries, keys and values of one decode step.

    Attributes
    ----------
    q : Tensor [B, H, D]
    k, v : Tensor [B, Hkv, T + window, D]
        The dense cache, what dense peers attend to; its first T tokens are what gets compressed.
    k_window, v_window : Tensor [B, Hkv, window, D]
    lengths : Tensor, int32 [B, 2]
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(seed)
        s = shape
        self.q = self._random(s.batch, s.q_heads, s.head_dim)
        self.k = self._random(s.batch, s.kv_heads, s.tokens + s.window, s.head_dim)
        self.v = self._random(s.batch, s.kv_heads, s.tokens + s.window, s.head_dim)
        self.k_window, self.v_window = (x[:, :, s.tokens :].contiguous() for x in (self.k, self.v))
        lengths = [[s.tokens, s.window]] * s.batch
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def _random(self, *shape: int) -> torch.Tensor:
        dtype = getattr(torch, self.shape.dtype)
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self.device)

    @cached_property
    def p(self) -> torch.Tensor:
        """Attention weights [B, H, T] for `value_output`."""
        s = self.shape
        return self._random(s.batch, s.q_heads, s.tokens).float().softmax(-1).to(self.q.dtype)

    @cached_property
    def workspace(self) -> torch.Tensor:
        s = self.shape
        slices = -(-s.tokens // 64)
        return ops.decode_attention_workspace(self.q, s.kv_heads, slices, s.window)

    def compress(self, sparsity: float, layout: str = "uniform") -> tuple[CompressedTensor, CompressedTensor]:
        """The first T keys and values, pruned to `sparsity`, in the `uniform` or the `general` layout."""
        kept = num_kept(sparsity, self.shape.head_dim)
        k, v = (ops.prune_compress(x[:, :, : self.shape.tokens], kept) for x in (self.k, self.v))
        if layout == "general":
            k, v = (ops.compress(ops.decompress(c)) for c in (k, v))
        return k, v

    def attend(self, k: CompressedTensor, v: CompressedTensor) -> torch.Tensor:
        """Our decode attention: [B, H, D]."""
        return ops.decode_attention(
            self.q, k, v, self.k_window, self.v_window, self.lengths, workspace=self.workspace
        )


class Corner:
    """The first and last KV head of the first and last sequence: small enough to recompute in float32."""

    def __init__(self, problem: Problem) -> None:
        self.problem, s = problem, problem.shape
        self.sequences = sorted({0, s.batch - 1})
        self.heads = sorted({0, s.kv_heads - 1})

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, Hkv, ...] here."""
        return x[self.sequences][:, self.heads]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, ...] here, query heads by group: [b, hkv, G, ...]."""
        return self.of(group_rows(x, self.problem.shape.kv_heads))

    def decompressed(self, c: CompressedTensor) -> torch.Tensor:
        """What `c` stands for, here, by the reference."""
        parts = {name: getattr(c, name) for name in ("bitmap", "values", "offsets", "widths")}
        cut = {name: self.of(x) for name, x in parts.items() if x is not None and x.dim() > 1}
        return reference.decompress(dataclasses.replace(c, **cut))

    def attention(
        self, got: torch.Tensor, pruned: tuple[CompressedTensor, CompressedTensor] | None = None
    ) -> Accuracy:
        """Error of the attention `got` [B, H, D] over the `pruned` cache or the dense, and SDPA's in its dtype."""
        if pruned is None:
            k, v = (self.of(x) for x in (self.problem.k, self.problem.v))
        else:
            windows = (self.problem.k_window, self.problem.v_window)
            k, v = (
                torch.cat([self.decompressed(c), self.of(w)], 2) for c, w in zip(pruned, windows, strict=True)
            )
        q = self.rows(self.problem.q)
        same = sdpa(*(x.to(got.dtype) for x in (q, k, v)))
        return accuracy(self.rows(got).flatten(1, 2), same, matmul_attention(q.float(), k.float(), v.float()))

    def key_scores(self, got: torch.Tensor, pruned: CompressedTensor | None = None) -> Accuracy:
        """Error of the scores `got` [B, H, T] with the `pruned` keys or the dense ones, and a matrix product's."""
        k = self.of(self.problem.k) if pruned is None else self.decompressed(pruned)
        q = self.rows(self.problem.q)
        return accuracy(self.rows(got).flatten(1, 2), dense_scores(q, k), dense_scores(q.float(), k.float()))

    def value_output(self, got: torch.Tensor, pruned: CompressedTensor | None = None) -> Accuracy:
        """Error of the output `got` [B, H, D] with the `pruned` values or the dense ones, and a matrix product's."""
        v = self.of(self.problem.v) if pruned is None else self.decompressed(pruned)
        p = self.rows(self.problem.p).flatten(1, 2)
        return accuracy(self.rows(got).flatten(1, 2), dense_output(p, v), dense_output(p.float(), v.float()))
