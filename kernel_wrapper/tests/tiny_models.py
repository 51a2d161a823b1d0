"""Small random models of the supported families, and what the cache tests do with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mustafar.cache import MustafarCache
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral_sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 90}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3_mixed": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1},
    ),
}
HEAD_DIM = {"mistral": 128, "qwen3": 80}  # 64 in the others


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: tensors are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random two-layer model in float32 whose tokens depend on its whole context."""
    model_class, config_class, special = FAMILIES[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 if family != "qwen2" else 2,  # Qwen2 has no head_dim of its own
        "num_key_value_heads": 2 if family != "qwen2" else 1,
        "head_dim": HEAD_DIM.get(family, 64),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": None,  # generate as many tokens as asked for
        **special,
        **overrides,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def prompts(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids [batch, tokens] without 0, which pads."""
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded_prompts(batch: int, tokens: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [batch, tokens] whose row r begins with `step * r` tokens of padding, and their mask."""
    ids = prompts(batch, tokens)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : step * row] = 0
        mask[row, : step * row] = 0
    return ids, mask


def cache_for(model: PreTrainedModel, backend: str, sparsity: float = 0.6, **settings: Any) -> MustafarCache:
    return MustafarCache(model.config, sparsity, sparsity, backend=backend, **settings)


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, new: int = 40, **options: Any
) -> torch.Tensor:
    """Tokens of `generate`, the prompt and `new` more."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    options.setdefault("do_sample", False)
    torch.manual_seed(7)  # for sampling
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, pad_token_id=0, **options)
