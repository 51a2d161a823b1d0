"""Dense keys and values of a prompt live for one layer at a time: the peak of a prefill, counted in bytes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from mustafar.prefill import mlp_in_pieces
from tiny_models import cache_for, one_thread, prompts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DynamicCache, PreTrainedModel

__all__ = ["one_thread"]

BATCH, PROMPT = 2, 1024
DENSE = (
    2 * BATCH * 2 * PROMPT * 128 * 4
)  # bytes of one layer: keys and values, 2 KV heads, head dim 128, float32


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.sizes or size == 0:
            return
        self.sizes[place] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


def _model(layers: int) -> PreTrainedModel:
    return tiny("mistral", num_hidden_layers=layers, hidden_size=64, intermediate_size=64)


def _prefill(model: PreTrainedModel, cache: Any) -> Live:
    ids = prompts(BATCH, PROMPT)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with torch.no_grad(), Live() as live:
        live.sizes.update(dict.fromkeys(weights, 0))  # views of them are not new memory
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return live


def _peak(layers: int, **settings: Any) -> tuple[int, int]:
    """Bytes of the peak, and of what the cache holds, queries that rules score by included."""
    model = _model(layers)
    dense = settings.pop("dense", False)
    cache = DynamicCache(config=model.config) if dense else cache_for(model, "kernel", 0.7, **settings)
    live = _prefill(model, cache)
    if dense:
        return live.peak, 0
    observers = [layer.observer for layer in cache.layers if cache.settings.observes]
    return live.peak, cache.memory()["allocated_bytes"] + sum(o.queries.nbytes for o in observers)


def test_the_count_sees_a_dense_cache() -> None:
    """Every layer more keeps its keys and values, and nothing else."""
    few, many = _peak(2, dense=True)[0], _peak(6, dense=True)[0]
    assert many - few == 4 * DENSE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"static": True, "max_length": PROMPT},
        {"k_rule": "ThinK", "v_rule": "Vt_Opt"},
        {"v_rule": "Vc_Mag"},
    ],
    ids=["dynamic", "static", "observing", "general"],
)
def test_every_layer_more_takes_its_packed_bytes(settings: dict) -> None:
    (few, held_by_few), (many, held_by_many) = _peak(2, **settings), _peak(6, **settings)
    packed = held_by_many - held_by_few
    assert packed < 4 * 0.8 * DENSE  # the window of 351 tokens is a third of this prompt
    assert abs((many - few) - packed) <= 0.01 * packed


def test_pieces_bound_the_activations_of_the_mlps() -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=2048)
    peaks = []
    for pieces in (None, 128):
        cache = cache_for(model, "kernel", 0.7)
        with mlp_in_pieces(model, pieces):
            peaks.append(_prefill(model, cache).peak)
    whole, in_pieces = peaks
    inner = BATCH * PROMPT * 2048 * 4
    assert whole > 3 * inner  # gate, its activation, up
    assert in_pieces < whole - 2 * inner
