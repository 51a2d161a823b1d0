"""Triton kernels of the sliced bitmap format: prune + compress, compress of any pattern, decompress.

Each function takes and returns what the op of the same name in `torch.ops.mustafar` does. The kernels see one or
more token rows of a slice at a time as a [rows, channels] tile; `FORMAT.md` has the layout they write.

They run on CUDA tensors, and on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1`` before import).
The ops use them only where the extension was built without CUDA: the CUDA kernels of the same names (`csrc/`) give
the same bits and are several times faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLICE_TOKENS = 64
VECTOR_VALUES = 8
MAX_HEAD_DIM = 256
#: Rows of a tile: a warp of a 4-warp program then holds 8 rows, small enough for the scans to stay in registers.
TILE_ROWS = 32
#: Bits of the magnitude of infinity; everything above is NaN.
_INFINITY_KEY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


@triton.jit
def _tile(pid, heads, slices, ROWS: tl.constexpr):
    """Batch, head, slice and first row of the tile that program `pid` works on, in 64 bits."""
    tiles: tl.constexpr = 64 // ROWS
    slice_id = pid.to(tl.int64) // tiles
    row = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    return slice_id, slice_id // (heads * slices), (slice_id // slices) % heads, slice_id % slices, row


@triton.jit
def _load_rows(
    x, batch, head, token, channel, tokens, head_dim, batch_stride, head_stride, token_stride
):  # fmt: skip
    start = x + batch * batch_stride + head * head_stride
    inside = (token < tokens)[:, None] & (channel < head_dim)[None, :]
    return tl.load(start + token[:, None] * token_stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store_bitmap(bitmap, keep, slice_id, row, words, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write keep [ROWS, COLS] as `words` 32-bit halves a row (little endian: the int64 words of the format)."""
    lanes: tl.constexpr = COLS // 32
    bits = tl.reshape(keep.to(tl.int32), (ROWS, lanes, 32)) << tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, lanes)
    place = (slice_id * 64 + row)[:, None] * words + word[None, :]
    tl.store(bitmap + place, tl.sum(bits, 2), mask=(word < words)[None, :])


@triton.jit
def _magnitude_bits(tile):
    """Bits of |tile|, int32: they order like the magnitudes, and a subnormal is not taken for zero anywhere."""
    return tile.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def _slot(row, rank):
    """Where value `rank` of `row` lies in its slice: [rank / 8][row][rank % 8]."""
    return (rank // 8) * 512 + row * 8 + rank % 8


@triton.jit
def _prune_compress_kernel(
    x, bitmap, values, tokens, head_dim, kept, width, heads, slices, words,
    batch_stride, head_stride, token_stride,
    INFINITY_KEY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    slice_id, batch, head, s, row = _tile(tl.program_id(0), heads, slices, ROWS)
    token = s * 64 + row
    channel = tl.arange(0, COLS)
    tile = _load_rows(
        x, batch, head, token, channel, tokens, head_dim, batch_stride, head_stride, token_stride
    )  # fmt: skip

    # Magnitudes as integers order like the floats, with NaN on top; all NaN tie, as in the reference.
    key = tl.minimum(_magnitude_bits(tile), INFINITY_KEY + 1)
    key = tl.where((channel < head_dim)[None, :], key, -1)

    # The kept-th largest key of a row, bit by bit: the largest threshold that `kept` keys reach.
    threshold = tl.zeros((ROWS,), tl.int32)
    for bit in tl.static_range(15):
        candidate = threshold | (1 << (14 - bit))
        reached = tl.sum((key >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= kept, candidate, threshold)

    # Everything above the threshold stays; ties at it fill the rest from the lowest channel. One scan ranks both:
    # the count of larger keys rides in the high half of the word.
    above = (key > threshold[:, None]).to(tl.int32)
    tie = (key == threshold[:, None]).to(tl.int32)
    ranks = tl.cumsum(above * 65536 + tie, 1)
    room = (kept - tl.sum(above, 1))[:, None]
    tie_rank = ranks & 0xFFFF
    keep = (above == 1) | ((tie == 1) & (tie_rank <= room))
    rank = (ranks >> 16) + tl.minimum(tie_rank, room) - 1

    # Rows past the end were read as zeros: they write zeros into their slots but no bits.
    _store_bitmap(bitmap, keep & (token < tokens)[:, None], slice_id, row, words, ROWS, COLS)
    start = values + slice_id * 64 * width
    tl.store(start + _slot(row[:, None], rank), tile, mask=keep)
    spare = kept + tl.arange(0, 8)
    zero = tl.zeros((ROWS, 8), tile.dtype)
    tl.store(start + _slot(row[:, None], spare[None, :]), zero, mask=(spare < width)[None, :])


@triton.jit
def _count_kernel(
    x, bitmap, widths, tokens, head_dim, heads, slices, words,
    batch_stride, head_stride, token_stride, COLS: tl.constexpr,
):  # fmt: skip
    slice_id, batch, head, s, row = _tile(tl.program_id(0), heads, slices, 64)
    tile = _load_rows(
        x, batch, head, s * 64 + row, tl.arange(0, COLS), tokens, head_dim,
        batch_stride, head_stride, token_stride,
    )  # fmt: skip
    keep = _magnitude_bits(tile) != 0
    _store_bitmap(bitmap, keep, slice_id, row, words, 64, COLS)
    fullest = tl.max(tl.sum(keep.to(tl.int32), 1), 0)
    tl.store(widths + slice_id, (fullest + 7) // 8 * 8)


@triton.jit
def _fill_kernel(
    x, offsets, values, tokens, head_dim, heads, slices,
    batch_stride, head_stride, token_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    slice_id, batch, head, s, row = _tile(tl.program_id(0), heads, slices, ROWS)
    tile = _load_rows(
        x, batch, head, s * 64 + row, tl.arange(0, COLS), tokens, head_dim,
        batch_stride, head_stride, token_stride,
    )  # fmt: skip
    keep = _magnitude_bits(tile) != 0
    rank = tl.cumsum(keep.to(tl.int32), 1) - 1
    tl.store(values + tl.load(offsets + slice_id) + _slot(row[:, None], rank), tile, mask=keep)


@triton.jit
def _decompress_kernel(
    bitmap, values, offsets, out, tokens, head_dim, heads, slices, words,
    bitmap_batch_stride, bitmap_head_stride, values_batch_stride, values_head_stride,
    offsets_batch_stride, offsets_head_stride, slice_values,
    UNIFORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    _, batch, head, s, row = _tile(tl.program_id(0), heads, slices, ROWS)
    token = s * 64 + row
    channel = tl.arange(0, COLS)
    word = channel // 64
    place = (token[:, None] * words) + word[None, :]
    start = bitmap + batch * bitmap_batch_stride + head * bitmap_head_stride
    bits = tl.load(start + place, mask=(word < words)[None, :], other=0)
    keep = ((bits >> (channel % 64).to(tl.int64)[None, :]) & 1).to(tl.int32)
    rank = tl.cumsum(keep, 1) - 1
    if UNIFORM:
        first = batch * values_batch_stride + head * values_head_stride + s * slice_values
    else:
        first = tl.load(offsets + batch * offsets_batch_stride + head * offsets_head_stride + s)
    tile = tl.load(values + first + _slot(row[:, None], rank), mask=keep == 1, other=0.0)
    inside = (token < tokens)[:, None] & (channel < head_dim)[None, :]
    dense = out + ((batch * heads + head) * tokens + token)[:, None] * head_dim + channel[None, :]
    tl.store(dense, tile, mask=inside)


def _columns(head_dim: int) -> int:
    """Channels of a tile: a power of two, at least one bitmap word."""
    return max(64, triton.next_power_of_2(head_dim))


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in _INFINITY_KEY:
        raise TypeError(f"x.dtype: expected float16 or bfloat16 on a GPU, got {x.dtype}")


def _check_dense(x: torch.Tensor) -> None:
    _check_dtype(x)
    if x.dim() != 4:
        raise ValueError(f"x.shape: expected [B, Hkv, T, D], got {tuple(x.shape)}")
    if not 0 < x.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: expected 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"x: expected a contiguous last dimension, got strides {x.stride()}")


def _empty_bitmap(x: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, head_dim = x.shape
    slices = triton.cdiv(tokens, SLICE_TOKENS)
    return x.new_empty((batch, heads, slices, SLICE_TOKENS, triton.cdiv(head_dim, 64)), dtype=torch.int64)


def _guard(x: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def prune_compress(x: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the `kept` largest magnitudes of each row of x [B, Hkv, T, D] and pack them; one pass, no host sync.

    Returns bitmap int64 [B, Hkv, S, 64, W] and values [B, Hkv, S, width / 8, 64, 8].
    """
    _check_dense(x)
    batch, heads, tokens, head_dim = x.shape
    if not 1 <= kept <= head_dim:
        raise ValueError(f"k: expected 1 to {head_dim} values kept per row, got {kept}")
    bitmap = _empty_bitmap(x)
    slices, words = bitmap.shape[2], bitmap.shape[4]
    width = triton.cdiv(kept, VECTOR_VALUES) * VECTOR_VALUES
    values = x.new_empty((batch, heads, slices, width // VECTOR_VALUES, SLICE_TOKENS, VECTOR_VALUES))
    tiles = batch * heads * slices * (SLICE_TOKENS // TILE_ROWS)
    if tiles:
        with _guard(x):
            _prune_compress_kernel[(tiles,)](
                x, bitmap.view(torch.int32), values, tokens, head_dim, kept, width, heads, slices, 2 * words,
                *x.stride()[:3], _INFINITY_KEY[x.dtype], TILE_ROWS, _columns(head_dim),
            )  # fmt: skip
    return bitmap, values


def compress(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack the non-zeros (NaN included) of x [B, Hkv, T, D] into the general layout.

    Two passes and one host synchronisation: the size of the values depends on the data.
    Returns bitmap, flat values, offsets int64 [B, Hkv, S] and widths int32 [B, Hkv, S].
    """
    _check_dense(x)
    batch, heads, tokens, head_dim = x.shape
    bitmap = _empty_bitmap(x)
    slices, words = bitmap.shape[2], bitmap.shape[4]
    widths = x.new_empty((batch, heads, slices), dtype=torch.int32)
    count = widths.numel()
    shape = (tokens, head_dim, heads, slices)
    if count:
        with _guard(x):
            _count_kernel[(count,)](
                x, bitmap.view(torch.int32), widths, *shape, 2 * words, *x.stride()[:3], _columns(head_dim)
            )
    sizes = widths.to(torch.int64) * SLICE_TOKENS
    ends = sizes.flatten().cumsum(0)
    total = int(ends[-1]) if count else 0
    offsets = ends.view_as(sizes) - sizes
    values = x.new_zeros(total)
    if total:
        with _guard(x):
            _fill_kernel[(count * (SLICE_TOKENS // TILE_ROWS),)](
                x, offsets, values, *shape, *x.stride()[:3], TILE_ROWS, _columns(head_dim)
            )
    return bitmap, values, offsets, widths


def decompress(
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor | None,
    widths: torch.Tensor | None,
    tokens: int,
    head_dim: int,
) -> torch.Tensor:
    """The dense [B, Hkv, T, D] of either layout, zeros where nothing was kept."""
    _check_dtype(values)
    batch, heads, _, _, words = bitmap.shape
    out = values.new_empty((batch, heads, tokens, head_dim))
    tiles = batch * heads * triton.cdiv(tokens, SLICE_TOKENS) * (SLICE_TOKENS // TILE_ROWS)
    if not tiles:
        return out
    uniform = offsets is None
    value_strides = values.stride()[:2] if uniform else (0, 0)
    offset_strides = (0, 0) if uniform else offsets.stride()[:2]
    slice_values = values.shape[3] * SLICE_TOKENS * VECTOR_VALUES if uniform else 0
    with _guard(values):
        _decompress_kernel[(tiles,)](
            bitmap, values, offsets, out, tokens, head_dim, heads, triton.cdiv(tokens, SLICE_TOKENS), words,
            *bitmap.stride()[:2], *value_strides, *offset_strides, slice_values,
            uniform, TILE_ROWS, _columns(head_dim),
        )  # fmt: skip
    return out
