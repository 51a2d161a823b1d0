"""What is compared: a cache, and the loop that decodes with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..shared.errors import UserError
from .dense import fixed_cache, flash_cache

LOOPS = {
    "dense": "generate",
    "dense-static": "decoder",
    "dense-flash": "decoder",
    "dense-cudnn": "decoder",
    "dense-compiled": "compiled",
    "mustafar": "decoder",
    "mustafar-auto": "decoder",
    "mustafar-dynamic": "generate",
    "mustafar-compiled": "compiled",
}
HELP = """\
dense               transformers' generate and its growing cache
dense-static        transformers' StaticCache in the captured loop of mustafar.decoding
dense-flash         FlashAttention with lengths on the device, in the same captured loop
dense-cudnn         cuDNN's attention, in the same captured loop; it takes its lengths from the host, so a step is
                    captured at one length, that of the middle of the others' steps: steps and largest batch only
dense-compiled      transformers' generate with its StaticCache, compiled by itself
mustafar-<s>        pruned to sparsity <s>, in the same captured loop (mustafar-0.7)
mustafar-auto-<s>   the same with backend="auto"; rows say which it chose
mustafar-dynamic-<s>, mustafar-compiled-<s>   pruned, in transformers' generate"""


@dataclasses.dataclass(frozen=True)
class Mode:
    """Attributes: `name`; `kind`, a key of LOOPS; `sparsity`, None for dense."""

    name: str
    kind: str
    sparsity: float | None

    @property
    def loop(self) -> str:
        """ "decoder", "generate" or "compiled"."""
        return LOOPS[self.kind]

    @property
    def fixed(self) -> bool:
        """Whether all steps are the same one, at one length, so that no text can be decoded."""
        return self.kind == "dense-cudnn"

    def settled(self, cache: Any) -> Mode:
        """What an "auto" mode became: by name, and by the bytes that it takes. Others are themselves."""
        if self.kind != "mustafar-auto":
            return self
        name = f"{self.name} ({cache.backend})"
        dense = cache.backend == "simulate"
        return Mode(name, "dense-flash", None) if dense else Mode(name, "mustafar", self.sparsity)

    def make_cache(self, model: Any, max_length: int) -> Any:
        """An empty cache with room for `max_length` tokens. Sets the model's attention."""
        import mustafar
        from transformers import DynamicCache, StaticCache

        if self.sparsity is not None:
            room = {} if self.kind == "mustafar-dynamic" else {"static": True, "max_length": max_length}
            backend = "auto" if self.kind == "mustafar-auto" else "kernel"
            return mustafar.MustafarCache(model.config, self.sparsity, self.sparsity, backend=backend, **room)
        model.set_attn_implementation("sdpa")
        if self.kind == "dense-flash":
            return flash_cache(model.config, max_length)
        if self.fixed:
            return fixed_cache(model.config, max_length)
        if self.kind == "dense":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=max_length)

    def kv_bytes(self, shape: Shape, batch: int, max_length: int, tokens: int | None = None) -> int:
        """Bytes of keys and values by the format's arithmetic: those allocated for `max_length` tokens, or those
        that a step reads when `tokens` are held."""
        rows = batch * shape.layers * shape.kv_heads
        dense = shape.head_dim * shape.item
        if self.sparsity is None:
            return 2 * rows * (max_length if tokens is None else tokens) * dense
        from mustafar.format import SLICE_TOKENS, num_kept, width_for, words_for

        packed_row = 8 * words_for(shape.head_dim) + shape.item * width_for(
            num_kept(self.sparsity, shape.head_dim)
        )
        residual, flush = 32, 256  # MustafarCache's defaults
        if tokens is None:
            packed = max_length // SLICE_TOKENS * SLICE_TOKENS
            window = min(max_length, residual + flush + SLICE_TOKENS - 1)
        else:
            packed = max(0, tokens - residual) // SLICE_TOKENS * SLICE_TOKENS
            window = tokens - packed
        return 2 * rows * (packed * packed_row + window * dense)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a model decides the size of its cache, and the bytes of weights that a step reads. Of a model divided
    among ranks: what this one has."""

    layers: int
    kv_heads: int
    head_dim: int
    item: int  # bytes of a number
    weight_bytes: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weights = sum(p.numel() * p.element_size() for p in map(_local, model.parameters()))
        table = _local(model.get_input_embeddings().weight)
        if table.data_ptr() != _local(model.get_output_embeddings().weight).data_ptr():
            weights -= table.numel() * table.element_size()  # a step reads a few rows of it
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        for name, weight in model.named_parameters():
            if name.endswith(".k_proj.weight"):
                kv_heads = _local(weight).shape[0] // head_dim
        return cls(
            config.num_hidden_layers,
            kv_heads,
            head_dim,
            torch.finfo(model.dtype).bits // 8,
            weights,
            config.vocab_size,
        )


def _local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; others as they are."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def parse(name: str) -> Mode:
    """Mode `name`, e.g. "dense-static" or "mustafar-0.7".

    Raises
    ------
    UserError
        Naming the valid ones.
    """
    if name in LOOPS and not name.startswith("mustafar"):
        return Mode(name, name, None)
    kind, _, sparsity = name.rpartition("-")
    try:
        value = float(sparsity)
    except ValueError:
        value = -1.0
    if kind in LOOPS and kind.startswith("mustafar") and 0 <= value < 1:
        return Mode(name, kind, value)
    raise UserError(f"unknown mode {name!r}; valid:\n{HELP}")
