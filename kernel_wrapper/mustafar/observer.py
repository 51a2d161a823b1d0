"""`Observer`: the queries that a layer remembers for rules that score by them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mustafar.pruning import OBSERVED_QUERIES, Observed
from mustafar.store import Select


class Observer:
    """The last queries of one layer, and what attention did with them.

    Twice as many are kept as a score takes, so that after `crop` (rejected candidates of assisted decoding)
    enough are left.
    """

    def __init__(self) -> None:
        self.queries: torch.Tensor | None = None  # [B, H, n, D], those of the last n tokens
        self.starts: torch.Tensor | None = None  # int64 [B], None where nothing is padding
        self.scaling = 1.0
        self.sliding_window = 0

    @property
    def seen(self) -> int:
        """Queries remembered."""
        return 0 if self.queries is None else self.queries.shape[2]

    def add(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        sliding_window: int | None,
    ) -> None:
        """Remember query [B, H, T, D]. The first mask, of a turn on an empty cache, tells what is padding."""
        room = 2 * OBSERVED_QUERIES
        query = query.detach()[:, :, -room:]
        if self.queries is None:
            self.queries, self.starts = query.clone(), _padding(mask, query.shape[0])
        else:
            left = room - query.shape[2]
            held = self.queries[:, :, max(0, self.seen - left) :]
            self.queries = torch.cat([held, query], dim=2)
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.sliding_window = sliding_window or 0

    def observed(
        self, keys: Callable[[], torch.Tensor], kv_heads: int, tokens: int, first: int, last: int
    ) -> Observed:
        """What to score the tokens `first` to `last` of `tokens` by."""
        return Observed(
            self.queries[:, :, -OBSERVED_QUERIES:],
            kv_heads,
            keys,
            tokens,
            first,
            last,
            self.starts,
            self.scaling,
            self.sliding_window,
        )

    def crop(self, removed: int) -> None:
        """Forget the queries of the last `removed` tokens."""
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(0, self.seen - removed)]

    def select(self, rows: Select) -> None:
        """Replace the batch: `rows` picks from dim 0."""
        if self.queries is not None:
            self.queries = rows(self.queries)
        if self.starts is not None:
            self.starts = rows(self.starts)


def _padding(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """First position that is not padding, int64 [B], from the mask of a first turn: [B, T], or [B, 1, T, T],
    bool or additive. There a token sees itself unless it is padding."""
    if mask is None:
        return None
    seen = mask if mask.dim() == 2 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
    if mask.dim() == 4 and mask.dtype != torch.bool:
        seen = seen > torch.finfo(mask.dtype).min / 2
    # Without host synchronisation; a row that is all padding has no first position.
    first = torch.where(seen.any(-1), seen.to(torch.int32).argmax(-1), seen.shape[-1])
    return first.expand(batch)
