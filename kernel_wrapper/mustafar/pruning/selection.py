"""`keep_top`: the one place that owns how many values stay, and which of equal ones."""

from __future__ import annotations

import torch

from mustafar.format import num_kept


def keep_top(score: torch.Tensor, sparsity: float, dim: str = "channel", group: int = 32) -> torch.Tensor:
    """Mark the highest scores; `num_kept(sparsity, n)` of every `n` that are ranked together.

    Ties go to the lowest index. NaN ranks above infinity, so that it is kept and stays visible.

    Parameters
    ----------
    score : Tensor [..., T, D]
        Larger = keep. T may be 1 where all tokens share a score (structured pruning): the result broadcasts.
    sparsity : float
        Fraction pruned, 0 <= sparsity < 1.
    dim : {"channel", "token"}
        "channel" ranks the D channels of each token (per-token pruning, paper section 3.2). "token" ranks,
        for each channel, the tokens of one group (per-channel pruning).
    group : int
        Tokens ranked together when `dim` is "token"; the last group may be shorter.

    Returns
    -------
    Tensor, bool of the shape of `score`
        True where kept.

    Raises
    ------
    ValueError
        For an unknown `dim`, a sparsity outside [0, 1) or a group below 1.
    """
    if dim == "channel":
        return _keep_top_last(score, num_kept(sparsity, score.shape[-1]))
    if dim != "token":
        raise ValueError(f"dim must be 'channel' or 'token', got {dim!r}")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"group is a number of tokens and must be a positive int, got {group!r}")
    tokens, by_channel = score.shape[-2], score.transpose(-1, -2)  # [..., D, T]
    whole = tokens - tokens % group
    groups = by_channel[..., :whole].unflatten(-1, (whole // group, group))
    keep = _keep_top_last(groups, num_kept(sparsity, group)).flatten(-2)
    if whole < tokens:
        rest = _keep_top_last(by_channel[..., whole:], num_kept(sparsity, tokens - whole))
        keep = torch.cat([keep, rest], dim=-1)
    return keep.transpose(-1, -2)


def _keep_top_last(score: torch.Tensor, kept: int) -> torch.Tensor:
    """True for the `kept` highest of the last dim."""
    if kept == score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    # A descending sort puts NaN first. One NaN and one zero: a radix sort would rank payloads and signs.
    score = torch.where(score.isnan(), torch.nan, score + 0.0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(score, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :kept], True)
