"""What is measured: shapes and sparsities of every section, on a GPU, on a CPU, and for a smoke run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

SECTIONS = ("attention", "spmv", "compression", "sweep", "context", "batch")
#: The sections whose op is decode attention.
ATTENTION_SECTIONS = ("attention", "sweep", "context", "batch")
SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TARGETS = (0.7, 0.5)
K = 1024


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step: queries over `tokens` compressed tokens a sequence and `window` dense ones behind them."""

    q_heads: int
    kv_heads: int
    batch: int
    tokens: int
    head_dim: int = 128
    window: int = 160
    dtype: str = "float16"

    @property
    def dense_bytes(self) -> int:
        """Bytes of dense K and V, the window not counted. (All dtypes measured have 2 bytes.)"""
        return 4 * self.batch * self.kv_heads * self.tokens * self.head_dim

    def __str__(self) -> str:
        text = f"{self.q_heads}/{self.kv_heads} heads, batch {self.batch}, {self.tokens:,} tokens"
        return f"{text}, D {self.head_dim}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, the sparsities (fractions of zeros) to measure it at, and whether the general layout too."""

    section: str
    shape: Shape
    sparsities: tuple[float, ...]
    general: bool = False


def _gpu(dtypes: tuple[str, ...] = ("float16", "bfloat16")) -> Iterator[Case]:
    targets = [
        Shape(32, 8, 32, 8 * K),
        Shape(32, 8, 8, 8 * K),
        Shape(32, 8, 1, 128 * K),
        Shape(32, 8, 1, 4 * K),
        Shape(32, 32, 8, 4 * K),
        Shape(64, 8, 8, 32 * K),
        Shape(40, 8, 8, 32 * K),  # groups of 5, 6 and 7, as Qwen has
        Shape(24, 4, 8, 32 * K),
        Shape(28, 4, 8, 32 * K),
    ]
    for dtype in dtypes:
        for shape in targets:
            general = (shape.kv_heads, shape.tokens, shape.batch) == (8, 8 * K, 8)
            yield Case("attention", dataclasses.replace(shape, dtype=dtype), TARGETS, general)
    yield Case("attention", Shape(32, 8, 32, 8 * K, head_dim=64), TARGETS)
    yield Case("attention", Shape(16, 4, 8, 8 * K, head_dim=256), TARGETS)
    for dtype in dtypes:
        for batch in (8, 32):
            yield Case("spmv", Shape(32, 8, batch, 8 * K, window=0, dtype=dtype), TARGETS)
    for dtype in dtypes:
        for batch in (8, 32):  # 64k and 256k tokens
            yield Case("compression", Shape(8, 8, batch, 8 * K, window=0, dtype=dtype), TARGETS, True)
    for batch in (32, 8):
        yield Case("sweep", Shape(32, 8, batch, 8 * K), SWEEP)
    for batch in (1, 8):
        for power in range(8):
            yield Case("context", Shape(32, 8, batch, K << power), TARGETS)
    for power in range(7):
        yield Case("batch", Shape(32, 8, 1 << power, 8 * K), TARGETS)


def _cpu() -> Iterator[Case]:
    yield Case("attention", Shape(32, 8, 1, 8 * K), TARGETS, True)
    yield Case("spmv", Shape(32, 8, 1, 8 * K, window=0), TARGETS)
    yield Case("compression", Shape(8, 8, 1, 8 * K, window=0), TARGETS, True)
    yield Case("sweep", Shape(32, 8, 1, 8 * K), SWEEP)
    for power in range(5):
        yield Case("context", Shape(32, 8, 1, K << power), TARGETS)
    for batch in (1, 2, 4):
        yield Case("batch", Shape(32, 8, batch, 8 * K), TARGETS)


def _quick() -> Iterator[Case]:
    small = Shape(8, 2, 2, 512, window=32)
    yield Case("attention", small, TARGETS, True)
    yield Case("attention", dataclasses.replace(small, batch=1, tokens=300), TARGETS)
    yield Case("spmv", dataclasses.replace(small, window=0), TARGETS)
    yield Case("compression", dataclasses.replace(small, window=0), TARGETS, True)
    yield Case("sweep", small, SWEEP[::2])
    for tokens in (128, 256):
        yield Case("context", dataclasses.replace(small, tokens=tokens), TARGETS)
    for batch in (1, 2):
        yield Case("batch", dataclasses.replace(small, batch=batch, tokens=256), TARGETS)


def plan(sections: tuple[str, ...], on_gpu: bool, quick: bool = False) -> list[Case]:
    """The cases of `sections`, in order."""
    cases = _quick() if quick else _gpu() if on_gpu else _cpu()
    return [case for case in cases if case.section in sections]
