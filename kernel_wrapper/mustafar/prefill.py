"""Prompts whose activations do not fit: the MLPs take a part of the tokens at a time.

Of what a prefill allocates, one layer's MLP is the most: its inner activations are 3.5 times as wide as the hidden
state in Llama-3, for all tokens of all prompts. An MLP works on each token alone, so taking fewer at a time changes
no result and, from some thousand tokens on, no speed. Attention sees the whole prompt, unpruned.

`prefill_chunk_size` of transformers' `generate` goes further and bounds all activations, but each chunk attends to
the earlier ones as the cache holds them: pruned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel


@contextlib.contextmanager
def mlp_in_pieces(model: PreTrainedModel, most_tokens: int | None) -> Iterator[None]:
    """Within it, the MLPs of `model` take at most so many tokens at once, those of a batch together::

        with mlp_in_pieces(model, 16384):
            model.generate(**inputs, past_key_values=cache)

    Parameters
    ----------
    model : PreTrainedModel
        Its decoder layers call their parts `self_attn` and `mlp`, as transformers' do.
    most_tokens : int or None
        None changes nothing.

    Raises
    ------
    ValueError
        If `most_tokens` is below 1, or the model has no such part.
    """
    if most_tokens is None:
        yield
        return
    if most_tokens < 1:
        raise ValueError(f"mlp_tokens is a number of tokens of at least 1, got {most_tokens}")
    parts = [
        module.mlp for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")
    ]
    if not parts:
        raise ValueError(f"mlp_tokens: {type(model).__name__} has no layers with `self_attn` and `mlp`")
    for part in parts:
        part.forward = _piecewise(part.forward, most_tokens)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _piecewise(forward: Callable[..., Any], most_tokens: int) -> Callable[..., Any]:
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= most_tokens or args or kwargs:
            return forward(x, *args, **kwargs)
        out = torch.empty_like(rows)
        for begin in range(0, rows.shape[0], most_tokens):
            there = slice(begin, begin + most_tokens)
            out[there] = forward(rows[None, there])[0]
        return out.view_as(x)

    return run
