"""The paper's models by shape: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..shared.errors import UserError
from ..shared.models import looks_like_path
from .ranks import Ranks

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 131072,
    },
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": {
        **_LLAMA_3,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral-7b": {
        **_LLAMA_3,
        "model_type": "mistral",
        "vocab_size": 32000,
        "sliding_window": None,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    },
}


def load(model: str, dtype: str, device: str, ranks: Ranks | None = None) -> Any:
    """A preset with random weights, or the checkpoint at a path or hub id, on `device`; of several ranks, a share.

    Raises
    ------
    UserError
        If it is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = getattr(torch, dtype)
    ranks = ranks or Ranks()
    preset = PRESETS.get(model)
    if preset is not None:
        special = {"eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
        options = {name: value for name, value in preset.items() if name != "model_type"}
        config = AutoConfig.for_model(preset["model_type"], **special, **ranks.share(options))
        torch.manual_seed(0)
        with torch.device(device):
            loaded = AutoModelForCausalLM.from_config(config, dtype=kind)
        ranks.add_up(loaded)
        return loaded.eval()
    if (looks_like_path(model) or "/" not in model) and not Path(model).expanduser().is_dir():
        raise UserError(f"--model {model}: neither a preset ({', '.join(PRESETS)}) nor a folder nor a hub id")
    try:
        split = {"tp_plan": "auto"} if ranks.count > 1 else {}
        loaded = AutoModelForCausalLM.from_pretrained(
            str(Path(model).expanduser()), dtype=kind, trust_remote_code=False, **split
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: {str(error).splitlines()[0]}") from None
    return (loaded if ranks.count > 1 else loaded.to(device)).eval()
