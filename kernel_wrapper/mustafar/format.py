"""The sliced bitmap format: `CompressedTensor` and its arithmetic. kernel/FORMAT.md spells it out bit by bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

SLICE_TOKENS = 64  #: consecutive tokens of one KV head that share a width
WORD_BITS = 64  #: channels per bitmap word
VECTOR_VALUES = 8  #: values per vector: 16 bytes of float16 or bfloat16
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def num_kept(sparsity: float, head_dim: int) -> int:
    """Values kept in a row of `head_dim` channels at `sparsity` (fraction of zeros, 0 <= sparsity < 1).

    ``head_dim - floor(sparsity * head_dim)``: 128 channels keep 64 at 0.5 and 39 at 0.7. (The paper's code keeps
    one more at either, by an off-by-one in ``kthvalue``.)
    """
    check_sparsity(sparsity)
    # The guard absorbs the float error of products that are whole in decimal: 0.29 * 100 is 28.999999999999996.
    return head_dim - math.floor(sparsity * head_dim + 1e-9)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise ValueError unless `sparsity` is a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} is the fraction of zeros and must be a number in [0, 1), got {sparsity!r}")


def slices_for(tokens: int) -> int:
    """Slices of 64 tokens that hold `tokens` tokens."""
    return -(-tokens // SLICE_TOKENS)


def words_for(head_dim: int) -> int:
    """64-bit bitmap words of a row of `head_dim` channels."""
    return -(-head_dim // WORD_BITS)


def width_for(kept: int) -> int:
    """Value slots of a row that keeps `kept` values: whole vectors of 8."""
    return -(-kept // VECTOR_VALUES) * VECTOR_VALUES


@dataclasses.dataclass(frozen=True)
class CompressedTensor:
    """Keys or values of shape [B, Hkv, T, D], pruned and packed.

    Attributes
    ----------
    bitmap : Tensor, int64 [B, Hkv, S, 64, W]
        Bit ``c % 64`` (least significant first) of word ``c // 64`` is set where channel ``c`` is kept.
        ``S = ceil(T / 64)`` slices, ``W = ceil(D / 64)`` words. Rows past T and bits past D are 0.
    values : Tensor
        Uniform layout: [B, Hkv, S, width / 8, 64, 8]. Row ``t`` of a slice keeps its values in ascending channel
        order at ``[i // 8, t, i % 8]``; unused slots are 0. General layout: flat, each slice in that order.
    offsets : Tensor or None
        General layout only: int64 [B, Hkv, S], where each slice starts in `values` (in values, a multiple of 8).
    widths : Tensor or None
        General layout only: int32 [B, Hkv, S], slots per row of each slice, a multiple of 8, possibly 0.
    tokens : int
        T, the tokens held.
    head_dim : int
        D, the channels of a row.

    `bitmap`, uniform `values`, `offsets` and `widths` may be views into larger stores: only the first two dims may
    be strided, the rest is contiguous.
    """

    bitmap: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor | None
    widths: torch.Tensor | None
    tokens: int
    head_dim: int

    @property
    def is_uniform(self) -> bool:
        """Whether every slice has the same width (the fast path)."""
        return self.offsets is None

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, Hkv, T, D] of the tensor this one stands for."""
        return (self.bitmap.shape[0], self.bitmap.shape[1], self.tokens, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of bitmaps, values and tables."""
        parts = (self.bitmap, self.values, self.offsets, self.widths)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * self.values.element_size()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors alone, e.g. for safetensors; `from_state_dict` is the way back."""
        state = {
            "bitmap": self.bitmap.contiguous(),
            "values": self.values.contiguous(),
            "shape": torch.tensor([self.tokens, self.head_dim], dtype=torch.int64),
        }
        if not self.is_uniform:
            state |= {"offsets": self.offsets.contiguous(), "widths": self.widths.contiguous()}
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> CompressedTensor:
        """Rebuild and validate what `state_dict` returned."""
        missing = {"bitmap", "values", "shape"} - set(state)
        if missing:
            raise ValueError(f"not a compressed tensor: missing {sorted(missing)}, found {sorted(state)}")
        tokens, head_dim = state["shape"].tolist()
        tensor = cls(
            state["bitmap"], state["values"], state.get("offsets"), state.get("widths"), tokens, head_dim
        )
        return tensor.validate()

    def to(self, *args: Any, **kwargs: Any) -> CompressedTensor:
        """Copy to another device (as `Tensor.to`; the dtype stays)."""
        moved = {
            name: part.to(*args, **kwargs) for name, part in self.state_dict().items() if name != "shape"
        }
        if moved["values"].dtype != self.dtype:
            raise ValueError(f"to() moves between devices; it cannot change dtype {self.dtype}")
        return dataclasses.replace(self, **moved)

    def validate(self, contents: bool = True) -> CompressedTensor:
        """Check shapes and dtypes, and with `contents` every bitmap and table entry. Returns self.

        Raises
        ------
        ValueError
            Naming the part, what was expected and what was found. `contents` reads the data back to the host.
        """
        _check_structure(self)
        if contents:
            _check_contents(self)
        return self


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_structure(c: CompressedTensor) -> None:
    _expect(0 < c.head_dim <= MAX_HEAD_DIM, "head_dim", f"1 to {MAX_HEAD_DIM}", c.head_dim)
    _expect(c.values.dtype in DTYPES, "values.dtype", "float16, bfloat16 or float32", c.values.dtype)
    _expect(c.bitmap.dtype == torch.int64, "bitmap.dtype", "int64", c.bitmap.dtype)
    slices, words = slices_for(c.tokens), words_for(c.head_dim)
    tail = (slices, SLICE_TOKENS, words)
    _expect(
        c.bitmap.dim() == 5 and tuple(c.bitmap.shape[2:]) == tail,
        "bitmap.shape",
        f"[B, Hkv, {slices}, {SLICE_TOKENS}, {words}] for {c.tokens} tokens of {c.head_dim} channels",
        tuple(c.bitmap.shape),
    )
    lead = tuple(c.bitmap.shape[:3])
    _expect(
        (c.offsets is None) == (c.widths is None),
        "offsets and widths",
        "both or neither",
        (c.offsets, c.widths),
    )
    _expect(c.bitmap.device == c.values.device, "values.device", str(c.bitmap.device), c.values.device)
    if c.is_uniform:
        shape = tuple(c.values.shape)
        _expect(
            len(shape) == 6 and shape[:3] == lead and shape[4:] == (SLICE_TOKENS, VECTOR_VALUES),
            "values.shape",
            f"[{', '.join(map(str, lead))}, width / 8, {SLICE_TOKENS}, {VECTOR_VALUES}]",
            shape,
        )
        return
    _expect(c.values.dim() == 1, "values", "one flat dimension in the general layout", tuple(c.values.shape))
    for name, table, dtype in (("offsets", c.offsets, torch.int64), ("widths", c.widths, torch.int32)):
        _expect(table.dtype == dtype, f"{name}.dtype", str(dtype), table.dtype)
        _expect(tuple(table.shape) == lead, f"{name}.shape", str(list(lead)), tuple(table.shape))
        _expect(table.device == c.values.device, f"{name}.device", str(c.values.device), table.device)


def _check_contents(c: CompressedTensor) -> None:
    counts = popcount(c.bitmap).sum(-1)  # [B, Hkv, S, 64]
    spare = words_for(c.head_dim) * WORD_BITS - c.head_dim
    if spare and c.bitmap.numel():
        past = c.bitmap[..., -1] >> (WORD_BITS - spare)  # arithmetic shift: any set bit stays visible
        _expect(not bool(past.any()), "bitmap", f"no bits past channel {c.head_dim - 1}", "set bits there")
    past_rows = counts.flatten(2)[..., c.tokens :]
    _expect(not bool(past_rows.any()), "bitmap", f"empty rows past token {c.tokens - 1}", "set bits there")
    if c.is_uniform:
        width = c.values.shape[3] * VECTOR_VALUES
        most = int(counts.max()) if counts.numel() else 0
        _expect(most <= width, "bitmap", f"at most {width} (the width) set bits in a row", most)
        return
    widths = c.widths.to(torch.int64)
    _expect(
        bool(((widths >= 0) & (widths % VECTOR_VALUES == 0)).all()),
        "widths",
        "multiples of 8 from 0",
        c.widths,
    )
    _expect(
        bool((counts.amax(-1) <= widths).all()) if counts.numel() else True,
        "widths",
        "at least the largest count of set bits in a row of the slice",
        "a smaller one",
    )
    # The room before a slice's end, not the end: an offset near 2^63 plus the slice would wrap to below 0.
    latest = c.values.numel() - widths * SLICE_TOKENS
    inside = (c.offsets >= 0) & (c.offsets % VECTOR_VALUES == 0) & (c.offsets <= latest)
    _expect(
        bool(inside.all()),
        "offsets",
        f"multiples of 8 with slices inside {c.values.numel()} values",
        "others",
    )


def popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each int64, as int64 of the same shape."""
    # The classic carry-save sum; the masks keep the arithmetic right shifts of int64 from dragging the sign in.
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56) & 0xFF
