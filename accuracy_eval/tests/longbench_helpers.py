"""A tiny Llama, a word-level tokenizer and rows in LongBench's format, for the LongBench tests."""

from __future__ import annotations

import json
from pathlib import Path

ACCURACY_EVAL = Path(__file__).resolve().parents[1]
WORDS = [f"w{number}" for number in range(80)]


def make_tokenizer():
    """Return a word-level tokenizer with a begin token, a newline token and a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>"]
    vocabulary = {word: index for index, word in enumerate([*special, "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    fast.chat_template = "<user> {{ messages[0]['content'] }} <bot>"
    return fast


def make_model(folder: Path, kind: str = "llama", *, seed: int = 0, layers: int = 2) -> Path:
    """Write a random model of one KV head of 64 with its tokenizer to `folder`, in the hub's layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, *, words: int = 20, seed: int = 0, **changes) -> list[dict]:
    """Return `count` rows of `words` random words each."""
    import random

    pick = random.Random(seed)
    return [
        {
            "input": " ".join(pick.choices(WORDS, k=3)),
            "context": " ".join(pick.choices(WORDS, k=words)),
            "answers": [pick.choice(WORDS)],
            "length": 100 * index,
            "dataset": "any",
            "language": "en",
            "all_classes": None,
            "_id": str(index),
        }
        | changes
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines, as the benchmark's files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Read JSON lines, every one of which must be complete."""
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.split(b"\n")[:-1]]
