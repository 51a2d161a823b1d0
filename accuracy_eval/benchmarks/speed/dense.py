"""Strong dense peers, without padding: FlashAttention with the lengths on the device, and cuDNN at one length.

transformers' `StaticCache` reads and copies the whole buffer under a mask at every step. `flash_cache` reads what is
held, once for all query heads of a KV head, split over the GPU, as serving engines do.

cuDNN's attention is the faster one, and as PyTorch calls it takes its lengths from the host, as shapes: a captured
step has one length for ever. So `fixed_cache` holds one token less than it has room for, and every step puts its
token into the last place and attends to all: the very step that fills the cache, again and again. That measures what
a step costs at that length; it cannot decode a text.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..shared.errors import UserError

NAME = "dense_flash"
FIXED_NAME = "dense_cudnn"


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


class FixedLayer(StaticLayer):
    """Room for `max_cache_len` tokens [B, Hkv, max_cache_len, D], of which a prompt has all but the last."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.filled = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys._fixed_layer = self
        tokens = key_states.shape[2]
        if tokens > 1:  # a prompt, on an empty cache
            self.keys[:, :, :tokens] = key_states
            self.values[:, :, :tokens] = value_states
            self.filled = True
            return key_states, value_states
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.max_cache_len - 1 if self.filled else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if query_length == 1 else query_length), 0

    def reset(self) -> None:
        self.filled = False


def fixed_cache(config: Any, max_length: int) -> Cache:
    """The cache; `model.config` is told to use its attention."""
    AttentionInterface.register(FIXED_NAME, fixed_attention)
    config._attn_implementation = FIXED_NAME
    cache = StaticCache(config=config, max_cache_len=max_length)
    cache.layers = [FixedLayer(max_length) for _ in cache.layers]
    return cache


def only_cudnn() -> contextlib.AbstractContextManager:
    """Within it, `scaled_dot_product_attention` is cuDNN's or an error."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def check_cudnn(device: torch.device, dtype: str, head_dim: int) -> None:
    """Whether a step's attention can be cuDNN's, by trying it.

    Raises
    ------
    UserError
        If not, with PyTorch's reason.
    """
    if device.type != "cuda":
        raise UserError(
            f"dense-cudnn needs a GPU that cuDNN's attention runs on, this is {device} (dense-static runs anywhere)"
        )
    kind = getattr(torch, dtype)
    query = torch.zeros((1, 2, 1, head_dim), dtype=kind, device=device)
    keys = torch.zeros((1, 1, 128, head_dim), dtype=kind, device=device)
    try:
        with only_cudnn():
            F.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"dense-cudnn: cuDNN's attention is not there for {dtype}, head_dim {head_dim}: {reason}"
        ) from None


def fixed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D]; returns [B, T, H, D]. A step attends to the whole cache."""
    if getattr(key, "_fixed_layer", None) is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query.shape[1] != key.shape[1]
    with only_cudnn():
        output = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2), None
