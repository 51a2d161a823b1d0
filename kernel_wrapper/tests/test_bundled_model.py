"""The bundled model on real prompts: every kind of cache and loop gives the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mustafar import Decoder, MustafarCache
from tiny_models import generate, one_thread
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

__all__ = ["one_thread"]

DEMO = Path(__file__).parents[2] / "accuracy_eval" / "demo"
pytestmark = pytest.mark.skipif(
    not (DEMO / "demo-llama").is_dir(), reason="the model lies in accuracy_eval/demo"
)
NEW = 40  # across two flushes
SHORT = {"residual_length": 8, "flush_every": 16}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]


def _load(device: str) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The model, and prompts of different tasks and lengths, left-padded."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(DEMO / "demo-llama", dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "demo-llama", padding_side="left")
    texts = []
    for number, name in enumerate(("homes", "employers", "topics", "paragraphs")):
        with (DEMO / "data" / f"{name}.jsonl").open(encoding="utf-8") as file:
            row = json.loads(next(file))
        texts.append(f"{row['context'][: 300 * (number + 1)]}\n{row['input']}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    return model, batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("device", DEVICES)
def test_static_dynamic_and_simulated_tokens_are_equal(device: str) -> None:
    """In half precision backends round differently, and only the first tokens are sure to agree."""
    model, ids, mask = _load(device)
    room = {"static": True, "max_length": ids.shape[1] + NEW}
    found = {}
    for name, settings in (("simulate", {"backend": "simulate"}), ("dynamic", {}), ("static", room)):
        model.set_attn_implementation("sdpa")
        cache = MustafarCache(model.config, 0.7, 0.7, **settings, **SHORT)
        found[name] = generate(
            model, ids, cache, NEW, attention_mask=mask, eos_token_id=[], disable_compile=True
        )
    decoder = Decoder(
        model,
        MustafarCache(model.config, 0.7, 0.7, **room, **SHORT),
        len(ids),
        eos_token_id=(),
        fuse=False,
    )
    found["decoder"] = decoder.generate(ids, mask, NEW).sequences
    assert len(found["dynamic"][:, ids.shape[1] :].unique()) > 8, "equality would mean little"
    same = NEW if device == "cpu" else 8
    for name, tokens in found.items():
        assert torch.equal(tokens[:, : ids.shape[1] + same], found["dynamic"][:, : ids.shape[1] + same]), name
