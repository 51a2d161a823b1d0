"""The "mustafar" attention and mask functions for transformers, and their registration.

Ordinary tensors (prefill, later turns, dense caches) go to FlashAttention 2 where it is installed and
applies, else to transformers' own sdpa. A `CompressedKV` handle goes to `mustafar.ops.decode_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from mustafar.layer import CompressedKV, MustafarLayer
from mustafar.static import StaticMustafarLayer
from mustafar.static_dense import StaticDenseLayer

NAME = "mustafar"

#: Keyword arguments by which models ask for what decode attention does not compute.
UNSUPPORTED = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def register() -> None:
    """Make ``attn_implementation="mustafar"`` known to transformers. Calling it again changes nothing.

    Both the attention and its mask are registered: without the mask function transformers passes no padding
    mask, and left-padded batches would silently come out wrong.
    """
    AttentionInterface.register(NAME, mustafar_attention)
    AttentionMaskInterface.register(NAME, mustafar_mask)


def mustafar_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | CompressedKV,
    value: torch.Tensor | CompressedKV,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D]; returns [B, T, H, D] and, as any fused attention, no weights.

    Raises
    ------
    NotImplementedError
        For softcap, sinks, a position bias, or dropout while decoding.
    """
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} needs {meaning} ({name}), which {NAME!r} attention does not "
                'compute: use backend="simulate" with an attention implementation that does, '
                "and rules that observe no queries (Kt_Mag, Vt_Mag)"
            )
    if isinstance(key, CompressedKV) and query.shape[2] > 1:
        layer = key.layer
        starts, ordinary = _row_starts(attention_mask, query, layer, sliding_window or 0)
        if ordinary and not dropout:
            output = layer.attend_rows(query, starts, scaling, sliding_window or 0)
            if isinstance(layer, MustafarLayer):
                layer.observe(query, attention_mask, scaling, sliding_window)
            return output, None
        key, value = layer.dense()
        key._mustafar_layer = layer if isinstance(layer, MustafarLayer) else None
    if not isinstance(key, CompressedKV):
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        compute = _flash_attention if _takes_flash(query, attention_mask) else ALL_ATTENTION_FUNCTIONS["sdpa"]
        result = compute(module, query, key, value, attention_mask, **kwargs)
        layer = getattr(key, "_mustafar_layer", None)  # of a cache whose rules score by recent queries
        if layer is not None:
            layer.observe(query, attention_mask, scaling, sliding_window)
        return result
    if dropout:
        raise NotImplementedError(
            f"decoding on the compressed cache takes no dropout, got {dropout}: call model.eval()"
        )
    layer = key.layer
    if isinstance(layer, (StaticMustafarLayer, StaticDenseLayer)):
        starts = _static_starts(attention_mask, query.shape[0], layer)
        output = layer.attend(query[:, :, 0].contiguous(), starts, scaling, sliding_window or 0)
        return output.unsqueeze(1), None
    starts = _starts(attention_mask, query.shape[0], layer)
    output = layer.attend(query[:, :, 0].contiguous(), starts, scaling, sliding_window or 0)
    layer.observe(query, attention_mask, scaling, sliding_window)
    return output.unsqueeze(1), None


def _starts(mask: torch.Tensor | None, batch: int, layer: MustafarLayer) -> torch.Tensor | None:
    """First visible position of each sequence, int32 [B], from the bool mask [B, 1, 1, T] of a decoding step.

    All layers get one mask object, so what is computed from it is kept on it. The first step after a prefill
    verifies that masked positions come first; later ones do not wait for the device, unless MUSTAFAR_CHECK=1.
    """
    if mask is None:
        return None
    tokens = layer.get_seq_length()
    if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, tokens) or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"attention_mask: decoding on the compressed cache takes bool [{batch}, 1, 1, {tokens}], as "
            f"transformers makes it from a 2D mask, got {mask.dtype} {list(mask.shape)}"
        )
    starts = getattr(mask, "_mustafar_starts", None)
    if starts is None:
        seen = mask[:, 0, 0]
        starts = (tokens - seen.sum(-1)).to(torch.int32)
        if layer.settings.check or not layer.mask_checked:
            _check_left_padding(seen, starts)
        starts = mask._mustafar_starts = starts.expand(batch).contiguous()
    layer.mask_checked = True
    return starts


def _row_starts(
    mask: torch.Tensor | None,
    query: torch.Tensor,
    layer: MustafarLayer | StaticMustafarLayer,
    sliding_window: int,
) -> tuple[torch.Tensor | None, bool]:
    """First visible position of each sequence for a few queries, and whether the mask is an ordinary one.

    Ordinary is causal, left-padded, and limited to the sliding window if there is one. Others (trees of
    candidates) are for dense attention. Waits for the device once for all layers, which share one mask.
    """
    if mask is None:
        return None, True
    batch, _, count, _ = query.shape
    held = sum(layer.held_tokens())
    known = getattr(mask, "_mustafar_rows", None)
    if known is not None and known[2:] == (held, sliding_window):
        return known[:2]
    starts, ordinary = None, False
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= held:  # FlashAttention's
        seen = mask[:, mask.shape[1] - held :].bool()
        starts = (held - seen.sum(-1)).to(torch.int32)
        _check_left_padding(seen, starts)
        ordinary = True
    elif mask.dtype == torch.bool and mask.shape[1:] == (1, count, held) and mask.shape[0] in (1, batch):
        position = torch.arange(held, device=mask.device)
        query_position = position[held - count :, None]
        starts = mask[:, 0, 0].to(torch.int32).argmax(-1).to(torch.int32)
        expected = (position <= query_position) & (position >= starts[:, None, None])
        if sliding_window:
            expected &= position > query_position - sliding_window
        ordinary = torch.equal(mask[:, 0], expected)
        starts = starts.expand(batch).contiguous()
    mask._mustafar_rows = (starts, ordinary, held, sliding_window)
    return starts, ordinary


def _static_starts(mask: torch.Tensor | None, batch: int, layer: StaticMustafarLayer) -> torch.Tensor | None:
    """The same for a static cache: from the bool mask [B, 1, 1, max_length] of transformers, or int32
    [B, 1, 1, 1], the first visible positions themselves, which a decode loop computes once."""
    if mask is None:
        return None
    if mask.dtype == torch.int32 and mask.shape == (batch, 1, 1, 1):
        return mask.view(batch)
    if (
        mask.dtype != torch.bool
        or mask.shape[1:] != (1, 1, layer.max_length)
        or mask.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"attention_mask: decoding on a static cache takes bool [{batch}, 1, 1, {layer.max_length}], as "
            "transformers makes it from a 2D mask, or the first visible positions as int32 "
            f"[{batch}, 1, 1, 1], got {mask.dtype} {list(mask.shape)}"
        )
    starts = mask[:, 0, 0].to(torch.int32).argmax(-1).to(torch.int32).expand(batch).contiguous()
    if not (layer.mask_checked or torch.compiler.is_compiling() or _is_capturing(mask)):
        _check_left_padding(mask[:, 0, 0, : int(layer.counters.total)], starts)
        layer.mask_checked = True
    return starts


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_left_padding(seen: torch.Tensor, starts: torch.Tensor) -> None:
    position = torch.arange(seen.shape[1], device=seen.device)
    wrong = (seen != (position >= starts[:, None])).any(-1)
    if wrong.any():
        raise ValueError(
            f"attention_mask: batch row {int(wrong.nonzero()[0])} masks positions behind visible ones. "
            "Decoding on the compressed cache takes left padding only: set tokenizer.padding_side to 'left', "
            "and pass the tokenizer's attention_mask (without one, generate guesses it from pad tokens)"
        )


def mustafar_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask for `mustafar_attention`: sdpa's, or FlashAttention's 2D padding mask for a prefill that goes
    there.

    Raises
    ------
    ValueError
        If the tokens no longer fit a static cache.
    """
    held, room = kwargs.get("q_offset"), kwargs.get("kv_length")
    if isinstance(held, torch.Tensor) and not torch.compiler.is_compiling():  # of a static cache
        # It waits for the device, as `generate` does anyway to see whether all sequences have ended.
        tokens = int(held) + kwargs.get("q_length", 1)
        if tokens > room:
            raise ValueError(
                f"max_length: the static cache has room for {room} tokens, and {tokens} are needed. Make it with a "
                "larger max_length, or stop there and keep the text so far with "
                "stopping_criteria=[mustafar.StopAtMaxLength(cache)]"
            )
    name = "flash_attention_2" if _mask_for_flash(kwargs) else "sdpa"
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, **kwargs)


def _mask_for_flash(kwargs: dict[str, Any]) -> bool:
    if not (is_flash_attn_2_available() and kwargs.get("dtype") in (torch.float16, torch.bfloat16)):
        return False
    # transformers before 5.4 passes the positions of the queries, later ones their number.
    positions = kwargs.get("cache_position")
    queries = kwargs.get("q_length", 1 if positions is None else positions.shape[0])
    device = torch.device(kwargs.get("device", "cpu" if positions is None else positions.device))
    custom = kwargs.get("use_vmap", False) or not kwargs.get("allow_is_causal_skip", True)
    return queries > 1 and device.type == "cuda" and not custom


def _takes_flash(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether these dense tensors go to FlashAttention 2; a 4D mask can only come from sdpa's mask
    function."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = mask is None or mask.dim() == 2
    return query.shape[2] > 1 and plain and half and query.is_cuda and is_flash_attn_2_available()


def _flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    is_causal = kwargs.get("is_causal")
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        query_length=query.shape[2],
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        attn_implementation="flash_attention_2",
    )
    return output, None
