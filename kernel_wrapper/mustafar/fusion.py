"""Fewer kernels in a step of a transformers decoder, for the time of a graph capture.

A decoder layer in transformers runs some thirty small kernels around its matrix products: norms, rotary
embedding, activation, sums. torch.compile makes about five of them. Compiling the whole model takes a minute;
here one layer is compiled and the code serves all, which takes a graph break around cache and attention (both
are few kernels already) and hiding the layer's number from the compiler, which would compile each layer for its
own. Matrix products of the same input are one (`mustafar.merging`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mustafar.merging import merged


@contextlib.contextmanager
def fused(model: PreTrainedModel, cache: Cache, backend: str = "inductor") -> Iterator[None]:
    """Within it, steps of `model` on `cache` run compiled code. Afterwards the model is as it was.

    Parts are found by the names that transformers' decoders share (`layers`, `self_attn`, `norm`,
    `rotary_emb`); a model without them runs as it is.
    """
    decoder = getattr(model, model.base_model_prefix, model)
    layers = [layer for layer in getattr(decoder, "layers", ()) if hasattr(layer, "self_attn")]
    others = [getattr(decoder, name) for name in ("norm", "rotary_emb") if hasattr(decoder, name)]
    attention = [layer.self_attn for layer in layers if isinstance(layer.self_attn.layer_idx, int)]
    name = model.config._attn_implementation
    numbers = [part.layer_idx for part in attention]
    limits = {
        key: 10_000 for key in ("recompile_limit", "cache_size_limit") if hasattr(torch._dynamo.config, key)
    }
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch._dynamo.config.patch(**limits))
        undo.enter_context(merged(model))
        for part in (*layers, *others):
            undo.callback(setattr, part, "_compiled_call_impl", part._compiled_call_impl)
            part.compile(backend=backend, dynamic=False)
        for part, number in zip(attention, numbers, strict=True):
            undo.callback(setattr, part, "layer_idx", number)
            part.layer_idx = torch.tensor(number)  # on the CPU: a value that compiled code does not look at
        undo.callback(cache.__dict__.pop, "update", None)
        cache.update = _outside(cache.update)
        if name in ALL_ATTENTION_FUNCTIONS:
            local = ALL_ATTENTION_FUNCTIONS._local_mapping
            undo.callback(local.pop, name, None)
            if name in local:
                undo.callback(local.__setitem__, name, local[name])
            ALL_ATTENTION_FUNCTIONS[name] = torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name])
        yield


def _outside(update: Any) -> Any:
    """`Cache.update` as compiled code calls it: not compiled itself."""

    @torch.compiler.disable
    def run(key: torch.Tensor, value: torch.Tensor, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        return update(key, value, int(layer_idx), *args, **kwargs)

    return run
