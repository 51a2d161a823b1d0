"""A strong dense peer: a static cache on FlashAttention with the lengths on the device.

transformers' `StaticCache` reads and copies the whole buffer under a mask at every step. This one reads what is
held, once for all query heads of a KV head, split over the GPU, as serving engines do. Without padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "dense_flash"


class _Shared:
    """What all layers count together."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest token
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.queries = torch.arange(batch + 1, dtype=torch.int32, device=device)


class FlashLayer(StaticLayer):
    """Keys and values as [B, tokens, Hkv, D], the layout FlashAttention reads with variable lengths."""

    def __init__(self, max_cache_len: int, shared: list[_Shared]) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.shared_by_all = shared

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        self.batch_size = batch
        self.keys = key_states.new_zeros((batch, self.max_cache_len, heads, head_dim))
        self.values = torch.zeros_like(self.keys)
        self.leads = not self.shared_by_all
        if self.leads:
            self.shared_by_all.append(_Shared(batch, self.device))
        self.shared = self.shared_by_all[0]
        self.cumulative_length = self.shared.total
        self.starts = self.shared.queries * self.max_cache_len
        self.keys._flash_layer = self
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, shared = key_states.shape[2], self.shared
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if tokens > 1:  # a prompt, on an empty cache
            self.keys[:, :tokens] = keys
            self.values[:, :tokens] = values
            if self.leads:
                shared.total.fill_(tokens)
                shared.lengths.fill_(tokens)
            return key_states, value_states
        if self.leads:
            shared.index.copy_(shared.total.view(1))
            shared.total.add_(1)
            shared.lengths.add_(1)
        self.keys.index_copy_(1, shared.index, keys)
        self.values.index_copy_(1, shared.index, values)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if query_length == 1 else query_length), 0

    def reset(self) -> None:
        if self.is_initialized and self.leads:
            self.shared.total.zero_()
            self.shared.lengths.zero_()


def flash_cache(config: Any, max_length: int) -> Cache:
    """The cache; `model.config` is told to use its attention."""
    AttentionInterface.register(NAME, attention)
    config._attn_implementation = NAME
    shared: list[_Shared] = []
    cache = StaticCache(config=config, max_cache_len=max_length)
    cache.layers = [FlashLayer(max_length, shared) for _ in cache.layers]
    return cache


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D]; returns [B, T, H, D]."""
    layer = getattr(key, "_flash_layer", None)
    if layer is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    q, shared = query[:, :, 0], layer.shared
    if q.is_cuda:
        output = torch.ops.aten._flash_attention_forward(
            q.contiguous(), key.flatten(0, 1), value.flatten(0, 1), shared.queries, layer.starts, 1,
            layer.max_cache_len, 0.0, False, False, scale=scaling, seqused_k=shared.lengths,
        )[0]  # fmt: skip
        return output.unsqueeze(1), None
    seen = torch.arange(layer.max_cache_len, device=q.device) < shared.lengths[:, None]
    rows = q.unflatten(1, (key.shape[2], -1))
    output = F.scaled_dot_product_attention(
        rows, key.transpose(1, 2), value.transpose(1, 2), seen[:, None, None], scale=scaling
    )
    return output.flatten(1, 2).unsqueeze(1), None
