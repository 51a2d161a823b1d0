"""The oracle: every op in plain PyTorch, written to be read in one sitting, not to be fast.

Each function is the twin of the op of the same name in `mustafar.ops` and takes and returns the same things.
All arithmetic on values is float32. Every implementation (Triton, CUDA, C++) is tested against this file.
"""

from __future__ import annotations

import torch

from mustafar.format import SLICE_TOKENS, VECTOR_VALUES, CompressedTensor, slices_for, width_for, words_for


def magnitude_keep(x: torch.Tensor, kept: int) -> torch.Tensor:
    """True for the `kept` largest magnitudes of each row [..., D]; paper section 3.2, per-token magnitude.

    Ties go to the lowest channel. NaN ranks above infinity, so it is kept and stays visible.
    """
    magnitude = x.float().abs()
    rank_above_inf = torch.where(magnitude.isnan(), torch.inf, 0.0)
    # Two stable sorts: by magnitude first, then NaN before everything; equal entries keep their channel order.
    order = magnitude.nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(
        dim=-1, descending=True, stable=True
    )
    nan_first = rank_above_inf.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, nan_first)
    keep = torch.zeros_like(x, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :kept], True)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers of the same width: moving values must not touch them, and some float moves rewrite NaNs."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def pack(x: torch.Tensor, keep: torch.Tensor, width: int | None) -> CompressedTensor:
    """Pack x [B, Hkv, T, D] where keep (bool, same shape) is True.

    With a `width` every slice gets that many slots (uniform layout); with None each slice gets what its fullest
    row needs (general layout).
    """
    batch, heads, tokens, head_dim = x.shape
    dtype, x = x.dtype, as_bits(x)
    slices, words = slices_for(tokens), words_for(head_dim)
    pad = slices * SLICE_TOKENS - tokens
    x = torch.nn.functional.pad(x, (0, 0, 0, pad)).view(batch, heads, slices, SLICE_TOKENS, head_dim)
    keep = torch.nn.functional.pad(keep, (0, 0, 0, pad)).view(x.shape)

    bits = torch.nn.functional.pad(keep, (0, words * 64 - head_dim)).view(*keep.shape[:-1], words, 64)
    bitmap = (bits.long() << torch.arange(64, device=x.device)).sum(-1)

    # Kept channels first, in ascending order: a stable sort of "not kept" is exactly that.
    order = (~keep).byte().argsort(dim=-1, stable=True)
    rows = torch.where(keep, x, torch.zeros_like(x)).gather(-1, order)
    counts = keep.sum(-1)
    if width is not None:
        if tokens and int(counts.max()) > width:
            raise ValueError(f"width {width} is too small for a row of {int(counts.max())} kept values")
        values = _vectors(rows, width).view(dtype)
        return CompressedTensor(bitmap, values, None, None, tokens, head_dim)

    fullest = counts.amax(-1)  # [B, Hkv, S]
    widths = -(-fullest // VECTOR_VALUES) * VECTOR_VALUES
    sizes = widths * SLICE_TOKENS
    offsets = sizes.flatten().cumsum(0).view_as(sizes) - sizes
    flat = rows.reshape(-1, SLICE_TOKENS, head_dim)
    pieces = [_vectors(piece, w).flatten() for piece, w in zip(flat, widths.flatten().tolist(), strict=True)]
    values = torch.cat(pieces).view(dtype) if pieces else x.new_zeros(0, dtype=dtype)
    return CompressedTensor(bitmap, values, offsets, widths.int(), tokens, head_dim)


def _vectors(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Rows [..., 64, D] with the kept values first -> [..., width / 8, 64, 8]."""
    rows = torch.nn.functional.pad(rows, (0, max(0, width - rows.shape[-1])))[..., :width]
    return rows.unflatten(-1, (width // VECTOR_VALUES, VECTOR_VALUES)).transpose(-3, -2).contiguous()


def keep_mask(c: CompressedTensor) -> torch.Tensor:
    """The bitmap as bool [B, Hkv, T, D]."""
    bits = (c.bitmap.unsqueeze(-1) >> torch.arange(64, device=c.device)) & 1
    return bits.flatten(-2).flatten(2, 3)[:, :, : c.tokens, : c.head_dim].bool()


def prune_compress(x: torch.Tensor, kept: int) -> CompressedTensor:
    """Keep the `kept` largest magnitudes of each row of x [B, Hkv, T, D] and pack them uniformly."""
    return pack(x, magnitude_keep(x, kept), width_for(kept))


def compress(x: torch.Tensor) -> CompressedTensor:
    """Pack the non-zeros (NaN included) of x [B, Hkv, T, D] into the general layout."""
    return pack(x, x != 0, None)


def decompress(c: CompressedTensor) -> torch.Tensor:
    """The dense tensor [B, Hkv, T, D], zeros where nothing was kept."""
    keep = torch.nn.functional.pad(keep_mask(c), (0, 0, 0, -c.tokens % SLICE_TOKENS))
    keep = keep.unflatten(2, (-1, SLICE_TOKENS))  # [B, Hkv, S, 64, D]
    packed = as_bits(c.values)
    if c.is_uniform:
        rows = packed.transpose(-3, -2).flatten(-2)  # [B, Hkv, S, 64, width]
    else:
        most = int(c.widths.max()) if c.widths.numel() else 0
        rows = packed.new_zeros(*keep.shape[:-1], most)
        for index in torch.cartesian_prod(*map(torch.arange, c.widths.shape)).view(-1, 3).tolist():
            b, h, s = index
            width, start = int(c.widths[b, h, s]), int(c.offsets[b, h, s])
            piece = packed[start : start + width * SLICE_TOKENS].view(-1, SLICE_TOKENS, VECTOR_VALUES)
            rows[b, h, s, :, :width] = piece.transpose(0, 1).flatten(1)
    rank = (keep.long().cumsum(-1) - 1).clamp(min=0)
    if rows.shape[-1] == 0:
        return c.values.new_zeros(c.shape)
    dense = torch.where(keep, rows.gather(-1, rank), 0)
    return dense.flatten(2, 3)[:, :, : c.tokens].contiguous().view(c.dtype)


def key_scores(q: torch.Tensor, c: CompressedTensor) -> torch.Tensor:
    """q [B, H, D] with every key of its KV head: float32 [B, H, T], not scaled."""
    keys = decompress(c).float().repeat_interleave(q.shape[1] // c.shape[1], dim=1)
    return torch.einsum("bhd,bhtd->bht", q.float(), keys)


def value_output(p: torch.Tensor, c: CompressedTensor) -> torch.Tensor:
    """p [B, H, T] times the values of its KV head: float32 [B, H, D]."""
    values = decompress(c).float().repeat_interleave(p.shape[1] // c.shape[1], dim=1)
    return torch.einsum("bht,bhtd->bhd", p.float(), values)


def visible(
    lengths: torch.Tensor, starts: torch.Tensor | None, sliding_window: int, size: int
) -> torch.Tensor:
    """Which of `size` positions each sequence may attend to: bool [B, size]."""
    position = torch.arange(size, device=lengths.device)
    total = lengths.sum(-1, keepdim=True)
    seen = position < total
    if starts is not None:
        seen = seen & (position >= starts[:, None])
    if sliding_window > 0:
        seen = seen & (position >= total - sliding_window)
    return seen


def decode_attention(
    q: torch.Tensor,
    k: CompressedTensor,
    v: CompressedTensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    sliding_window: int = 0,
) -> torch.Tensor:
    """One decode step of attention, float32 [B, H, D]; arguments as in `mustafar.ops.decode_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    size = int(lengths.sum(-1).max()) if lengths.numel() else 0
    seen = visible(lengths, starts, sliding_window, size)

    def joined(c: CompressedTensor, window: torch.Tensor) -> torch.Tensor:
        """Each sequence's compressed tokens followed by its window: [B, H, size, D]."""
        dense = torch.zeros(q.shape[0], k.shape[1], size, q.shape[2], device=q.device)
        for b, (packed, recent) in enumerate(lengths.tolist()):
            dense[b, :, :packed] = decompress(c)[b, :, :packed].float()
            dense[b, :, packed : packed + recent] = window[b, :, :recent].float()
        return dense.repeat_interleave(group, dim=1)

    scores = torch.einsum("bhd,bhtd->bht", q.float(), joined(k, k_window)) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None, None], 0.0)
    # Masked values must not reach the output even as 0 * NaN.
    values = joined(v, v_window).masked_fill(~seen[:, None, :, None], 0.0)
    return torch.einsum("bht,bhtd->bhd", weights, values)
