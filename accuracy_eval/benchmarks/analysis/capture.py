"""One prefill of a model whose attention hands over queries, keys and values, layer after layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..shared import models
from ..shared.errors import UserError

NAME = "mustafar_analysis"


@dataclass(frozen=True)
class Layer:
    """What the attention of one layer was given, positions encoded, without the batch dim.

    Attributes
    ----------
    index
        Of the layer.
    queries
        [H, n, D], those of the last n tokens.
    keys, values
        [Hkv, T, D].
    scaling
        Of q . k.
    sliding_window
        Positions that a query sees, its own included; 0 for all.
    """

    index: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    sliding_window: int


def load(info: models.ModelInfo, dtype: str, device: str):
    """Load a model whose attention `prefill` can listen to.

    Raises
    ------
    UserError
        If it cannot be loaded, or computes attention by itself.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    options = {"device_map": "auto"} if device == "auto" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            info.path,
            dtype=getattr(torch, dtype),
            attn_implementation=NAME,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        reason = "\n".join(str(error).strip().splitlines()[:3])
        raise UserError(f"cannot load {info.name} for an analysis: {reason}") from error
    return (model if options else model.to(device)).eval()


def prefill(model, ids: list[int], queries: int, take: Callable[[Layer], None]) -> int:
    """Run the prompt through the model, calling `take` in each layer; return the number of layers.

    Raises
    ------
    UserError
        If no layer's attention went through transformers' attention interface, or one needs what an error of
        its output would have to take into account.
    """
    count = 0

    def listen(module, query, key, value, scaling, sliding_window, others) -> None:
        nonlocal count
        asked = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
        if asked:
            raise UserError(
                f"{type(module).__name__} computes attention with {asked[0]}, which this analysis does not; "
                "analyse a model with plain attention"
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        index = getattr(module, "layer_idx", None)
        last = query[0, :, -queries:]
        take(Layer(count if index is None else index, last, key[0], value[0], scaling, sliding_window or 0))
        count += 1

    _LISTENERS.append(listen)
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        _LISTENERS.remove(listen)
    if not count:
        raise UserError(
            f"{type(model).__name__} does not use transformers' attention interface; analyse another model"
        )
    return count


_LISTENERS: list[Callable[..., None]] = []


def _attention(module, query, key, value, mask, scaling=None, sliding_window=None, **others):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for listen in _LISTENERS:
        listen(module, query, key, value, scaling, sliding_window, others)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, mask, scaling=scaling, sliding_window=sliding_window, **others)
