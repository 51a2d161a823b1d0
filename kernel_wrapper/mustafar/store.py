"""`SliceStore`: where a cache keeps its compressed slices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mustafar.format import SLICE_TOKENS, VECTOR_VALUES, CompressedTensor, width_for, words_for

Select = Callable[[torch.Tensor], torch.Tensor]  # picks rows of the batch dimension


class SliceStore:
    """A growing `CompressedTensor` of whole slices.

    Room grows by a quarter of what is used, so that appending copies each slice a bounded number of times,
    and `view` narrows without copying. In the uniform layout nothing here waits for the device.

    Parameters
    ----------
    x : Tensor [B, Hkv, *, D]
        Gives batch, heads, head dim, dtype and device.
    kept : int or None
        Values kept per token in the uniform layout, None for the general layout.
    """

    def __init__(self, x: torch.Tensor, kept: int | None) -> None:
        batch, heads, _, self.head_dim = x.shape
        self.slices = 0
        self.used_values = 0  # general layout only
        lead = (batch, heads, 0)
        self.bitmap = x.new_empty((*lead, SLICE_TOKENS, words_for(self.head_dim)), dtype=torch.int64)
        self.offsets = self.widths = None
        if kept is not None:
            vectors = width_for(kept) // VECTOR_VALUES
            self.values = x.new_empty((*lead, vectors, SLICE_TOKENS, VECTOR_VALUES))
        else:
            self.values = x.new_empty(0)
            self.offsets = x.new_empty(lead, dtype=torch.int64)
            self.widths = x.new_empty(lead, dtype=torch.int32)

    @property
    def is_uniform(self) -> bool:
        return self.offsets is None

    @property
    def tokens(self) -> int:
        return self.slices * SLICE_TOKENS

    def append(self, c: CompressedTensor) -> None:
        """Put whole slices behind those held."""
        if c.tokens % SLICE_TOKENS or c.is_uniform != self.is_uniform:
            raise ValueError(f"expected whole slices of the store's layout, got {c.tokens} tokens")
        self.bitmap = _put(self.bitmap, c.bitmap, 2, self.slices)
        if self.is_uniform:
            self.values = _put(self.values, c.values, 2, self.slices)
        else:
            self.offsets = _put(self.offsets, c.offsets + self.used_values, 2, self.slices)
            self.widths = _put(self.widths, c.widths, 2, self.slices)
            self.values = _put(self.values, c.values, 0, self.used_values)
            self.used_values += c.values.numel()
        self.slices += c.bitmap.shape[2]

    def view(self, first: int = 0, last: int | None = None) -> CompressedTensor:
        """Slices `first` to `last` (exclusive; all of them by default), not copied."""
        last = self.slices if last is None else last

        def cut(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part[:, :, first:last]

        values = cut(self.values) if self.is_uniform else self.values[: self.used_values]
        tokens = (last - first) * SLICE_TOKENS
        return CompressedTensor(
            cut(self.bitmap), values, cut(self.offsets), cut(self.widths), tokens, self.head_dim
        )

    def truncate(self, slices: int) -> None:
        """Drop all but the first `slices`; their room is used again."""
        self.slices = min(self.slices, slices)
        if not self.is_uniform:
            held = self.view()
            ends = held.offsets + held.widths * SLICE_TOKENS
            self.used_values = int(ends.max()) if ends.numel() else 0

    def select(self, rows: Select) -> None:
        """Replace the batch: `rows` picks from dim 0. Values of the general layout are shared, not copied."""
        held = self.view()
        self.bitmap = rows(held.bitmap)
        if self.is_uniform:
            self.values = rows(held.values)
        else:
            self.offsets, self.widths = rows(held.offsets), rows(held.widths)

    def used_bytes(self) -> int:
        """Bytes of the slices held."""
        return self.view().nbytes

    def allocated_bytes(self) -> int:
        """Bytes held from the allocator, the room to grow included."""
        parts = (self.bitmap, self.values, self.offsets, self.widths)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _put(buffer: torch.Tensor, new: torch.Tensor, dim: int, used: int) -> torch.Tensor:
    """`new` behind the first `used` of `buffer`, in it where it fits; returns the buffer."""
    count = new.shape[dim]
    if used == 0 and buffer.shape[dim] < count:
        return new  # a prompt is kept as it was compressed
    if buffer.shape[dim] < used + count:
        shape = list(buffer.shape)
        shape[dim] = max(used + count, used + used // 4)
        grown = buffer.new_empty(shape)
        grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
        buffer = grown
    buffer.narrow(dim, used, count).copy_(new)
    return buffer
