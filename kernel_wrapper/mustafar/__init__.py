"""Mustafar: prune keys and values to 50-70 % zeros, keep them as bitmap + values, attend to that directly.

The method of arXiv 2505.22913 (NeurIPS 2025) for any transformers model::

    cache = mustafar.MustafarCache(model.config, k_sparsity=0.7, v_sparsity=0.7)
    model.generate(**inputs, past_key_values=cache)

Nothing is loaded or registered before it is used: the format and the reference need torch alone, the cache needs
transformers, the ops need the native extension.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mustafar.format import CompressedTensor, num_kept

if TYPE_CHECKING:
    from mustafar import ops, pruning, reference
    from mustafar.attention import register
    from mustafar.cache import MustafarCache
    from mustafar.decoding import Decoder, StopAtMaxLength
    from mustafar.room import CacheDoesNotFit
    from mustafar.sampling import Sampling

__all__ = [
    "CacheDoesNotFit",
    "CompressedTensor",
    "Decoder",
    "MustafarCache",
    "Sampling",
    "StopAtMaxLength",
    "num_kept",
    "ops",
    "pruning",
    "reference",
    "register",
]

_FOUND_IN = {
    "CacheDoesNotFit": "mustafar.room",
    "Decoder": "mustafar.decoding",
    "MustafarCache": "mustafar.cache",
    "Sampling": "mustafar.sampling",
    "StopAtMaxLength": "mustafar.decoding",
    "register": "mustafar.attention",
}


def __getattr__(name: str) -> Any:
    if name in ("ops", "pruning", "reference"):
        return importlib.import_module(f"mustafar.{name}")
    if name in _FOUND_IN:
        return getattr(importlib.import_module(_FOUND_IN[name]), name)
    raise AttributeError(f"module 'mustafar' has no attribute {name!r}")
