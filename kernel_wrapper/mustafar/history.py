"""The keys, or the values, that one layer has seen: older tokens pruned, the local window dense.

`PackedHistory` keeps the pruned tokens compressed, `DenseHistory` keeps them as they are, with zeros: the
same numbers, so that the second one simulates the first. When to prune is the layer's decision; both follow
it alike.
"""

from __future__ import annotations

import abc

import torch

from mustafar import ops
from mustafar.format import SLICE_TOKENS, CompressedTensor
from mustafar.pruning import Observed, Pruning
from mustafar.store import Select, SliceStore


class History(abc.ABC):
    """What the two kinds have in common.

    Attributes
    ----------
    tokens : int
        Tokens held.
    pruned : int
        The oldest so many of them are pruned.
    """

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.tokens = 0
        self.pruned = 0

    @property
    def unpruned(self) -> int:
        return self.tokens - self.pruned

    @abc.abstractmethod
    def append(self, x: torch.Tensor) -> None:
        """Add tokens x [B, Hkv, T, D]."""

    @abc.abstractmethod
    def prune(self, pruned: int, behind: torch.Tensor | None = None, window: Observed | None = None) -> None:
        """Prune so that the oldest `pruned` tokens are; tokens `behind` are appended first. `window` is what
        was observed of the tokens to prune, for a rule that observes."""

    @abc.abstractmethod
    def dense(self) -> torch.Tensor:
        """All tokens, [B, Hkv, tokens, D]. Later calls on the history leave the result as it is."""

    @abc.abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget all but the oldest `tokens`. What is pruned stays pruned."""

    @abc.abstractmethod
    def select(self, rows: Select) -> None:
        """Replace the batch: `rows` picks from dim 0 of a tensor."""

    @abc.abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes of compressed tokens, of dense ones, what all would take dense, and what is allocated."""


class PackedHistory(History):
    """Compressed slices of 64 tokens, then a window: up to 63 pruned tokens short of a slice, dense ones.

    A token's values are the same on either side of that border, so the window may be cut anywhere, in both
    layouts.

    Parameters
    ----------
    pruning : Pruning
    x : Tensor [B, Hkv, *, D]
        Gives batch, heads, head dim, dtype and device.
    window_capacity : int
        Tokens that the window holds before it has to grow.
    """

    def __init__(self, pruning: Pruning, x: torch.Tensor, window_capacity: int) -> None:
        super().__init__(pruning)
        self.store = SliceStore(x, pruning.kept(x.shape[-1]) if pruning.rule.uniform else None)
        self.window_capacity = window_capacity  # it shrinks back to that when pruning has made room
        self.window = x.new_empty((*x.shape[:2], window_capacity, x.shape[3]))

    @property
    def packed_tokens(self) -> int:
        return self.store.tokens

    @property
    def window_tokens(self) -> int:
        return self.tokens - self.store.tokens

    def packed(self) -> CompressedTensor:
        """The compressed tokens; the window's follow them."""
        return self.store.view()

    def append(self, x: torch.Tensor) -> None:
        used = self.window_tokens
        self._reserve(used + x.shape[2])
        self.window[:, :, used : used + x.shape[2]] = x
        self.tokens += x.shape[2]

    def prune(self, pruned: int, behind: torch.Tensor | None = None, window: Observed | None = None) -> None:
        tail = self.window[:, :, : self.window_tokens]
        if behind is not None:
            tail = torch.cat([tail, behind], dim=2) if self.window_tokens else behind
            self.tokens += behind.shape[2]
        first = self.pruned - self.packed_tokens
        last = max(pruned, self.pruned) - self.packed_tokens
        whole = last - last % SLICE_TOKENS
        if self.pruning.rule.fused:
            # Compression prunes by itself, and pruning what is already pruned changes nothing.
            self._pack(tail[:, :, :whole])
            tail = self._prune_between(tail[:, :, whole:], max(first - whole, 0), last - whole)
        else:
            tail = self._prune_between(tail, first, last, window)
            self._pack(tail[:, :, :whole])
            tail = tail[:, :, whole:]
        self.pruned = max(pruned, self.pruned)
        if self.window.shape[2] > self.window_capacity >= tail.shape[2]:
            self.window = self.window.new_empty((*tail.shape[:2], self.window_capacity, tail.shape[3]))
        self._reserve(tail.shape[2], keep=False)
        self.window[:, :, : tail.shape[2]] = tail

    def _prune_between(
        self, tail: torch.Tensor, first: int, last: int, window: Observed | None = None
    ) -> torch.Tensor:
        """A copy of `tail` with tokens `first` to `last` pruned."""
        between = tail[:, :, first:last]
        between = self.pruning.prune(between, window) if last > first else between
        return torch.cat([tail[:, :, :first], between, tail[:, :, last:]], dim=2)

    def _pack(self, x: torch.Tensor) -> None:
        if x.shape[2] == 0:
            return
        uniform = self.pruning.rule.uniform
        # A token of a uniform rule has at most `kept` non-zeros left, so keeping that many keeps them all.
        self.store.append(
            ops.prune_compress(x, self.pruning.kept(x.shape[-1])) if uniform else ops.compress(x)
        )

    def _reserve(self, tokens: int, keep: bool = True) -> None:
        if tokens > self.window.shape[2]:
            window = self.window.new_empty((*self.window.shape[:2], tokens, self.window.shape[3]))
            if keep:
                window[:, :, : self.window_tokens] = self.window[:, :, : self.window_tokens]
            self.window = window

    def dense(self) -> torch.Tensor:
        return torch.cat(
            [self._unpacked(0, self.store.slices), self.window[:, :, : self.window_tokens]], dim=2
        )

    def _unpacked(self, first: int, last: int) -> torch.Tensor:
        if first == last:
            return self.window[:, :, :0]
        return ops.decompress(self.store.view(first, last))

    def crop(self, tokens: int) -> None:
        if tokens < self.packed_tokens:
            # The slice that the cut goes through returns to the window; its tokens are pruned already.
            slices, rest = divmod(tokens, SLICE_TOKENS)
            partial = self._unpacked(slices, slices + 1)[:, :, :rest] if rest else self.window[:, :, :0]
            self._reserve(rest)
            self.window[:, :, :rest] = partial
            self.store.truncate(slices)
        self.tokens = min(self.tokens, tokens)
        self.pruned = min(self.pruned, tokens)

    def select(self, rows: Select) -> None:
        self.store.select(rows)
        self.window = rows(self.window)

    def nbytes(self) -> dict[str, int]:
        return {
            "compressed_bytes": self.store.used_bytes(),
            "window_bytes": _token_bytes(self.window) * self.window_tokens,
            "dense_equivalent_bytes": _token_bytes(self.window) * self.tokens,
            "allocated_bytes": self.store.allocated_bytes() + self.window.nbytes,
        }


class DenseHistory(History):
    """One dense buffer with zeros where tokens are pruned."""

    def __init__(self, pruning: Pruning, x: torch.Tensor, window_capacity: int) -> None:
        super().__init__(pruning)
        self.buffer = x.new_empty((*x.shape[:2], window_capacity, x.shape[3]))

    def append(self, x: torch.Tensor) -> None:
        total = self.tokens + x.shape[2]
        if total > self.buffer.shape[2]:
            self._copy_buffer(total + total // 4)
        self.buffer[:, :, self.tokens : total] = x
        self.tokens = total

    def prune(self, pruned: int, behind: torch.Tensor | None = None, window: Observed | None = None) -> None:
        if behind is not None:
            self.append(behind)
        if pruned > self.pruned:
            self._copy_buffer(self.buffer.shape[2])  # what `dense` returned must not change
            between = self.buffer[:, :, self.pruned : pruned]
            between.copy_(self.pruning.prune(between, window))
            self.pruned = pruned

    def _copy_buffer(self, capacity: int) -> None:
        buffer = self.buffer.new_empty((*self.buffer.shape[:2], capacity, self.buffer.shape[3]))
        buffer[:, :, : self.tokens] = self.buffer[:, :, : self.tokens]
        self.buffer = buffer

    def dense(self) -> torch.Tensor:
        return self.buffer[:, :, : self.tokens]

    def crop(self, tokens: int) -> None:
        if tokens < self.tokens:
            self._copy_buffer(self.buffer.shape[2])
        self.tokens = min(self.tokens, tokens)
        self.pruned = min(self.pruned, tokens)

    def select(self, rows: Select) -> None:
        self.buffer = rows(self.buffer)

    def nbytes(self) -> dict[str, int]:
        used = _token_bytes(self.buffer) * self.tokens
        return {
            "compressed_bytes": 0,
            "window_bytes": used,
            "dense_equivalent_bytes": used,
            "allocated_bytes": self.buffer.nbytes,
        }


def _token_bytes(x: torch.Tensor) -> int:
    """Bytes of one token of x [B, Hkv, T, D], over all of B and Hkv."""
    return x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()
