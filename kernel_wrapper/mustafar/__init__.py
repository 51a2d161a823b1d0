"""Mustafar: prune keys and values to 50-70 % zeros, keep them as bitmap + values, attend to that directly.

The method of arXiv 2505.22913 (NeurIPS 2025) for any transformers model::

    cache = mustafar.MustafarCache(model.config, k_sparsity=0.7, v_sparsity=0.7)
    model.generate(**inputs, past_key_values=cache)
"""

from mustafar import ops, reference
from mustafar.format import CompressedTensor, num_kept

__all__ = ["CompressedTensor", "num_kept", "ops", "reference"]
