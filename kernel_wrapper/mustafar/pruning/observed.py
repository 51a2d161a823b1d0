"""What output-aware rules score by: the most recent queries, and the attention they pay to the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

#: Queries that a score is accumulated over (paper section 3; ThinK's observation window).
OBSERVED_QUERIES = 32


@dataclasses.dataclass(frozen=True)
class Observed:
    """Recent queries of one layer, as seen from the tokens `first` to `last` that are about to be pruned.

    After a prefill these are the last 32 queries of the prompt, at a later flush the last 32 queries until
    then: with a local window of 32 tokens exactly those of the window, which see every token pruned. Fewer
    where fewer were seen. Nothing is accumulated from step to step: keys do not change between two flushes,
    so the weights computed here at a flush are those that decoding computed one by one. They are float32.

    Attributes
    ----------
    queries : Tensor [B, H, n, D]
        As they met the keys, positions encoded; n <= 32. They are those of the last n tokens held.
    kv_heads : int
    keys : callable
        Returns all keys held, [B, Hkv, T, D], those pruned earlier with their zeros.
    tokens, first, last : int
        T, and the range that the methods report on.
    starts : Tensor, int64 [B], optional
        Positions before it are padding, which neither observes nor counts.
    scaling : float
        Of q . k.
    sliding_window : int
        A query sees the last `sliding_window` positions up to its own; 0 for all.
    """

    queries: torch.Tensor
    kv_heads: int
    keys: Callable[[], torch.Tensor]
    tokens: int
    first: int
    last: int
    starts: torch.Tensor | None
    scaling: float
    sliding_window: int

    def grouped_queries(self) -> torch.Tensor:
        """The queries of each KV head's group, float32 [B, Hkv, G, n, D], zero for padding."""
        queries = self.queries.float().unflatten(1, (self.kv_heads, -1))
        if self.starts is not None:
            seen = self._positions(self.tokens - queries.shape[3], self.tokens) >= self.starts[:, None]
            queries = torch.where(seen[:, None, None, :, None], queries, 0)
        return queries

    def is_token(self) -> torch.Tensor:
        """False for padding, bool [B or 1, 1, last - first, 1]."""
        position = self._positions(self.first, self.last)
        seen = position[None] >= (0 if self.starts is None else self.starts[:, None])
        return seen[:, None, :, None]

    def attention(self) -> torch.Tensor:
        """Attention weights of `first` to `last`, summed over the queries and the heads of the group:
        float32 [B, Hkv, last - first, 1].

        Fused attention returns no weights, so those of the n queries are computed here: n x T each.
        """
        queries, keys = self.grouped_queries(), self.keys()
        position = self._positions(0, self.tokens)
        own = self._positions(self.tokens - queries.shape[3], self.tokens)[:, None]
        visible = position <= own
        if self.sliding_window:
            visible = visible & (position > own - self.sliding_window)
        visible = visible[None, None]  # [B or 1, 1, n, T]
        if self.starts is not None:
            visible = visible & (position >= self.starts[:, None])[:, None, None]
        sums = []
        for head in range(self.kv_heads):  # one at a time: all of them would take H x n x T floats
            key = keys[:, None, head].float().contiguous()
            scores = (queries[:, head] @ key.transpose(-1, -2)) * self.scaling  # [B, G, n, T]
            weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1).masked_fill_(~visible, 0)
            sums.append(weights[..., self.first : self.last].sum((1, 2)))
        return torch.stack(sums, dim=1).unsqueeze(-1)

    def _positions(self, first: int, last: int) -> torch.Tensor:
        return torch.arange(first, last, device=self.queries.device)
