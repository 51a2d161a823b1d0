"""`backend="auto"` of a static cache: its dense form, and how a decoder decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mustafar import Decoder, MustafarCache, Sampling, choosing
from mustafar.static import StaticMustafarLayer
from mustafar.static_dense import StaticDenseLayer
from test_decoding import _pretend_cuda
from tiny_models import cache_for, generate, one_thread, padded_prompts, prompts, tiny
from transformers import PreTrainedModel

__all__ = ["one_thread"]

SHORT = {"residual_length": 8, "flush_every": 16}


def _auto(model: PreTrainedModel, room: int = 250, **settings: int) -> MustafarCache:
    return cache_for(model, "auto", static=True, max_length=room, **(SHORT | settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "mistral_sliding", "qwen2"])
def test_the_dense_form_gives_the_same_tokens(family: str) -> None:
    """Across flushes, with padding, for a second prompt of another length, and holding the same bits."""
    model = tiny(family)
    cache = _auto(model)
    cache.settle("simulate")
    decoder = Decoder(model, cache, 3)
    for tokens, step in ((90, 20), (41, 3)):
        ids, mask = padded_prompts(3, tokens, step)
        simulated = cache_for(model, "simulate", **SHORT)
        expected = generate(model, ids, simulated, new=60, attention_mask=mask)
        model.set_attn_implementation("mustafar")
        assert torch.equal(decoder.generate(ids, mask, 60).sequences, expected)
        held = simulated.layers[0].get_seq_length()
        assert cache.backend == "simulate" and cache.get_seq_length() == held
        for mine, theirs in zip(cache.layers, simulated.layers, strict=True):
            dense = theirs.dense()
            for buffer, other in zip((mine.keys, mine.values), dense, strict=True):
                assert torch.allclose(buffer[:, :held].transpose(1, 2), other, atol=1e-4)
                assert torch.equal(buffer[:, :held].transpose(1, 2) == 0, other == 0)
    memory = cache.memory()
    assert memory["compressed_bytes"] == 0 and memory["window_bytes"] == memory["dense_equivalent_bytes"]
    assert memory["allocated_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    "residual,flush,length", [(0, 1, 97), (0, 1, 1), (0, 64, 33), (40, 3, 1), (150, 20, 97)]
)
def test_timings(residual: int, flush: int, length: int) -> None:
    model, ids = tiny("llama"), prompts(1, length)
    settings = {"residual_length": residual, "flush_every": flush}
    expected = generate(model, ids, cache_for(model, "simulate", **settings), new=120)
    model.set_attn_implementation("mustafar")
    cache = _auto(model, length + 120, **settings)
    cache.settle("simulate")
    assert torch.equal(Decoder(model, cache, 1).generate(ids, max_new_tokens=120).sequences, expected)


def test_without_a_graph_it_is_the_kernels() -> None:
    """A decoder on a CPU, and `generate`."""
    model, ids = tiny("llama"), prompts(2, 60)
    expected = generate(model, ids, cache_for(model, "kernel", **SHORT), new=40)
    for use in (
        lambda cache: Decoder(model, cache, 2).generate(ids, max_new_tokens=40).sequences,
        lambda cache: generate(model, ids, cache, new=40),
    ):
        cache = _auto(model)
        assert cache.backend == "auto"
        assert torch.equal(use(cache), expected)
        assert cache.backend == "kernel" and isinstance(cache.layers[0], StaticMustafarLayer)


class _Graph:
    """Stands for a CUDA graph: a replay runs the step."""

    decoder: Decoder

    def replay(self) -> None:
        self.decoder._step()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA as far as a capture needs it, and a clock that runs by `cost` of the backend that steps."""
    _pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    told = SimpleNamespace(cost={}, now=0.0)
    monkeypatch.setattr(choosing, "time", SimpleNamespace(perf_counter=lambda: told.now))
    step = Decoder.step

    def counted(self: Decoder) -> None:
        told.now += told.cost.get(self.cache.backend, 0.0)
        step(self)

    monkeypatch.setattr(Decoder, "step", counted)
    return told


def _decoder(model: PreTrainedModel, cache: MustafarCache, **options: object) -> Decoder:
    decoder = Decoder(model, cache, 2, **options)
    decoder.uses_graph = True
    _Graph.decoder = decoder
    return decoder


@pytest.mark.parametrize("faster,kind", [("kernel", StaticMustafarLayer), ("simulate", StaticDenseLayer)])
@pytest.mark.parametrize("sampling", [None, Sampling(seed=4)], ids=["greedy", "sampled"])
def test_the_faster_one_stays(faster: str, kind: type, sampling: Sampling | None, pretended) -> None:
    pretended.cost = {"kernel": 2e-3, "simulate": 2e-3} | {faster: 1e-3}
    model = tiny("llama")
    ids, mask = padded_prompts(2, 60, 20)
    plain = Decoder(
        model, cache_for(model, "kernel", static=True, max_length=250, **SHORT), 2, sampling=sampling
    )
    expected = plain.generate(ids, mask, 60).sequences
    cache = _auto(model)
    decoder = _decoder(model, cache, sampling=sampling)
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, mask, 60).sequences, expected)
        assert cache.backend == faster and all(type(layer) is kind for layer in cache.layers)
        pretended.cost = {}  # it is decided once
    assert decoder.captures == 1


def test_where_the_dense_form_has_no_room(pretended, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StaticDenseLayer, "lazy_initialization", full)
    pretended.cost = {"kernel": 1.0}
    model, ids = tiny("llama"), prompts(2, 60)
    cache = _auto(model)
    _decoder(model, cache).generate(ids, max_new_tokens=5)
    assert cache.backend == "kernel"


def test_what_was_timed() -> None:
    model = tiny("llama")
    decoder = Decoder(model, _auto(model, 20), 1)
    assert choosing.choose_backend(decoder, 10) == {} and decoder.cache.backend == "kernel"
    assert choosing.choose_backend(decoder, 10) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["kernel", "simulate", None])
def test_captured_on_a_gpu(backend: str | None) -> None:
    """Both forms, and whichever is chosen. In half precision they round differently: the first tokens must agree."""
    model = tiny("llama").half().cuda()
    ids, mask = (x.cuda() for x in padded_prompts(3, 90, 20))
    plain = Decoder(model, cache_for(model, "kernel", static=True, max_length=250, **SHORT), 3, graph=False)
    expected = plain.generate(ids, mask, 60).sequences
    cache = _auto(model)
    if backend:
        cache.settle(backend)
    decoder = Decoder(model, cache, 3, fuse=False)
    first, again = (decoder.generate(ids, mask, 60).sequences for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first[:, : 90 + 8], expected[:, : 90 + 8])
    assert cache.backend == backend if backend else cache.backend in ("kernel", "simulate")
    assert decoder.captures == 1


def test_refused() -> None:
    model, ids = tiny("llama"), prompts(2, 30)
    cache = _auto(model, 40)
    cache.settle("simulate")
    with pytest.raises(NotImplementedError, match="decoded by mustafar"):
        generate(model, ids, cache)
    decoder = Decoder(model, cache, 2)
    with pytest.warns(UserWarning, match="the cache is full"):
        assert decoder.generate(ids, max_new_tokens=60).stopped == "max_length"
    with pytest.raises(ValueError, match="room for 40 tokens"):
        decoder.step()
    with pytest.raises(NotImplementedError, match="decoded by mustafar"):
        generate(model, ids, cache)
    with pytest.raises(NotImplementedError, match="beam search"):
        cache.reorder_cache(torch.tensor([1, 0]))
    for other in (cache_for(model, "kernel", static=True, max_length=9), cache_for(model, "auto")):
        with pytest.raises(ValueError, match="settle is for"):
            other.settle("kernel")
    with pytest.raises(ValueError, match='"kernel" or "auto", got "simulate"'):
        cache_for(model, "simulate", static=True, max_length=9)
