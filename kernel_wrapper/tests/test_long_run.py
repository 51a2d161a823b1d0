"""Long decoding on the bundled model: memory by the formula, logits that do not drift, caches that go away.

600 tokens; MUSTAFAR_LONG_RUN=20000 makes it that many.
"""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from mustafar import MustafarCache, attention
from tiny_models import one_thread
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

__all__ = ["one_thread"]

DEMO = Path(__file__).parents[2] / "accuracy_eval" / "demo"
pytestmark = pytest.mark.skipif(
    not (DEMO / "demo-llama").is_dir(), reason="the model lies in accuracy_eval/demo"
)
NEW = int(os.environ.get("MUSTAFAR_LONG_RUN", "600"))
RESIDUAL, FLUSH = 8, 16
SETTINGS = {"k_sparsity": 0.5, "v_sparsity": 0.7, "residual_length": RESIDUAL, "flush_every": FLUSH}
PACKED_ROW_BYTES = (16 + 4 * 64) + (16 + 4 * 40)  # bitmap and width in float32, of a key and of a value
DENSE_ROW_BYTES = 2 * 4 * 128
WINDOW = 63 + RESIDUAL + FLUSH


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    attention.register()
    loaded = AutoModelForCausalLM.from_pretrained(
        DEMO / "demo-llama", dtype=torch.float32, attn_implementation="mustafar"
    )
    config = loaded.config
    assert config.num_hidden_layers * config.num_key_value_heads == 8 and config.head_dim == 128
    return loaded.eval()


def _prompt() -> torch.Tensor:
    """[1, T] ids."""
    with (DEMO / "data" / "homes.jsonl").open(encoding="utf-8") as file:
        text = json.loads(next(file))["context"][:600]
    return AutoTokenizer.from_pretrained(DEMO / "demo-llama")(text, return_tensors="pt").input_ids


def _pruned_after(tokens: int, prompt: int) -> int:
    """The oldest so many of `tokens` are pruned: all but RESIDUAL of the prompt, then FLUSH more at a time, at the
    start of the step after they have gathered."""
    pruned = prompt - RESIDUAL
    return pruned + max(0, tokens - 1 - RESIDUAL - pruned) // FLUSH * FLUSH


def _check_memory(cache: MustafarCache, tokens: int, prompt: int) -> None:
    heads = 8
    packed = _pruned_after(tokens, prompt) // 64 * 64
    found = cache.memory()
    assert found["compressed_bytes"] == heads * packed * PACKED_ROW_BYTES
    assert found["window_bytes"] == heads * (tokens - packed) * DENSE_ROW_BYTES
    assert found["dense_equivalent_bytes"] == heads * tokens * DENSE_ROW_BYTES
    if cache.is_static:
        room = cache.max_length // 64 * 64
        assert found["allocated_bytes"] == heads * (room * PACKED_ROW_BYTES + WINDOW * DENSE_ROW_BYTES)
    else:  # a quarter more at most, to grow
        most = heads * ((packed + 64) * 1.25 * PACKED_ROW_BYTES + WINDOW * DENSE_ROW_BYTES)
        assert found["allocated_bytes"] <= most


def _dense_logits(model: PreTrainedModel, cache: MustafarCache, ids: torch.Tensor) -> torch.Tensor:
    """What dense attention makes of the last step, over the values that the cache holds."""
    dense = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.dense()
        dense.update(keys[:, :, :-1], values[:, :, :-1], index)
    return model(ids, past_key_values=dense, logits_to_keep=1).logits[0, -1]


def _rows_pruned_otherwise(one: MustafarCache, other: MustafarCache) -> float:
    """The share of rows of which the two have kept other channels."""
    differ = [
        (x != 0).ne(y != 0).any(-1).flatten()
        for layers in zip(one.layers, other.layers, strict=True)
        for x, y in zip(*(layer.dense() for layer in layers), strict=True)
    ]
    return float(torch.cat(differ).float().mean())


@torch.inference_mode()
def test_memory_and_logits_of_a_long_run(model: PreTrainedModel) -> None:
    """Tokens sampled hot, so that the text does not repeat itself, given to all three kinds of cache.

    The kernels must compute what dense attention does over the values they hold, as exactly at the end as at the
    beginning. A simulated cache of its own may part from them for another reason: once in some thousand rows
    rounding decides which of two channels of nearly one magnitude is kept, and that row stays in the cache.
    """
    ids = _prompt()
    prompt = ids.shape[1]
    caches = {
        "simulate": MustafarCache(model.config, backend="simulate", **SETTINGS),
        "dynamic": MustafarCache(model.config, **SETTINGS),
        "static": MustafarCache(model.config, static=True, max_length=prompt + NEW, **SETTINGS),
    }
    generator = torch.Generator().manual_seed(0)
    errors, parting, seen = [], [], set()
    for step in range(NEW):
        logits = {
            name: model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            for name, cache in caches.items()
        }
        scale = logits["dynamic"].abs().max()
        assert torch.equal(logits["static"], logits["dynamic"]), step
        parting.append((logits["simulate"] - logits["dynamic"]).abs().max() / scale)
        if step and step % max(1, NEW // 300) == 0:
            expected = _dense_logits(model, caches["dynamic"], ids)
            errors.append((logits["dynamic"] - expected).abs().max() / scale)
        for name in ("dynamic", "static"):
            _check_memory(caches[name], prompt + step, prompt)
        ids = (logits["dynamic"] / 5).softmax(-1).multinomial(1, generator=generator)[None]
        seen.add(int(ids))
    assert len(seen) > 100, "a text that repeats itself would mean little"
    assert (_pruned_after(prompt + NEW - 1, prompt) - prompt + RESIDUAL) // FLUSH >= NEW // FLUSH - 1, (
        "flushes"
    )
    error, part = torch.stack(errors), torch.stack(parting)
    first, last = error[: len(error) // 4], error[-(len(error) // 4) :]
    otherwise = _rows_pruned_otherwise(caches["dynamic"], caches["simulate"])
    print(
        f"kernel against dense: first quarter {first.median():.1e}, last {last.median():.1e}, most {error.max():.1e}"
    )
    print(
        f"against a simulated cache: median {part.median():.1e}, most {part.max():.1e}, rows {otherwise:.1e}"
    )
    assert error.max() < 1e-5
    assert last.median() <= 2 * first.median()
    assert part.max() < 5e-2 and otherwise < 5e-3


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _live_tensors() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("kind", ["simulate", "dynamic", "static"])
@torch.inference_mode()
def test_caches_dropped_are_freed(model: PreTrainedModel, kind: str) -> None:
    """100 of them, without the help of the garbage collector, which on a GPU would come too late."""
    ids = _prompt()[:, :1]
    keys, values = torch.randn(2, 1, 2, 512, 128, generator=torch.Generator().manual_seed(0))
    options = {"simulate": {"backend": "simulate"}, "static": {"static": True, "max_length": 600}}.get(
        kind, {}
    )
    size = 0

    def use() -> weakref.ref:
        nonlocal size
        cache = MustafarCache(model.config, **SETTINGS, **options)
        for layer in range(4):
            cache.update(keys, values, layer)
        for _ in range(2):
            model(ids, past_key_values=cache)
        size = cache.memory()["allocated_bytes"]
        return weakref.ref(cache)

    used = [use() for _ in range(10)]
    gc.collect()
    before, objects = _resident_bytes(), _live_tensors()
    gc.disable()
    try:
        used += [use() for _ in range(90)]
        assert not any(cache() is not None for cache in used)
        assert _live_tensors() == objects
    finally:
        gc.enable()
    assert _resident_bytes() - before < 10 * size
