"""A few queries per sequence on the compressed cache: short later turns, candidates of assisted decoding.

`ops.decode_attention` takes one query per sequence, and how many tokens that query sees. So the queries of a sequence
become rows of a batch that share its cache, each seeing one token more than the one before: nothing is copied, and
the result is that of causal attention. (One row for all of them would read the cache once; that takes the
log-sum-exp of the op, which it does not return, to add the new tokens' own part. The caches of these rows are one
and the same memory, which GPUs and CPUs keep close.)
"""

from __future__ import annotations

import dataclasses

import torch

from mustafar import ops
from mustafar.format import CompressedTensor

#: The most queries per sequence that go this way. More are cheaper on the decompressed cache.
MOST_QUERIES = 16


def attend_rows(
    query: torch.Tensor,
    keys: CompressedTensor,
    values: CompressedTensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    packed: int,
    window: int,
    starts: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int,
) -> torch.Tensor:
    """Causal attention of query [B, H, n, D], the last n of the tokens held; returns [B, n, H, D].

    Parameters
    ----------
    query : Tensor [B, H, n, D]
    keys, values, k_window, v_window, starts, scaling, sliding_window
        As in `mustafar.ops.decode_attention`.
    packed, window : int
        Tokens in the compressed cache, and in the window, those of the queries included.
    """
    batch, _, count, _ = query.shape
    lengths = torch.empty((count, 2), dtype=torch.int32, device=query.device)
    lengths[:, 0].fill_(packed)
    torch.arange(window - count + 1, window + 1, dtype=torch.int32, device=query.device, out=lengths[:, 1])
    rows = query.transpose(1, 2).contiguous()  # [B, n, H, D]
    output = torch.empty_like(rows)
    if batch <= count:
        for b in range(batch):  # the queries of a sequence in one call
            of_one = slice(b, b + 1)
            output[b] = ops.decode_attention(
                rows[b],
                _repeated(keys, of_one, count),
                _repeated(values, of_one, count),
                k_window[of_one].expand(count, -1, -1, -1),
                v_window[of_one].expand(count, -1, -1, -1),
                lengths,
                None if starts is None else starts[of_one].expand(count).contiguous(),
                scaling,
                sliding_window,
            )
        return output
    for i in range(count):  # one query of each sequence in one call
        output[:, i] = ops.decode_attention(
            rows[:, i].contiguous(),
            keys,
            values,
            k_window,
            v_window,
            lengths[i : i + 1].expand(batch, 2).contiguous(),
            starts,
            scaling,
            sliding_window,
        )
    return output


def _repeated(c: CompressedTensor, of_one: slice, count: int) -> CompressedTensor:
    """One sequence of `c` as a batch of `count`, not copied."""

    def repeat(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part[of_one].expand(count, *part.shape[1:])

    values = repeat(c.values) if c.is_uniform else c.values
    return dataclasses.replace(
        c, bitmap=repeat(c.bitmap), values=values, offsets=repeat(c.offsets), widths=repeat(c.widths)
    )
