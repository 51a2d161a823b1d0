"""`Decoder`: the tokens of `generate`, with dense and pruned caches, and the capture's bookkeeping."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from mustafar import Decoder, Sampling
from mustafar.fusion import fused
from mustafar.prefill import mlp_in_pieces
from mustafar.sampling import largest
from tiny_models import cache_for, generate, one_thread, padded_prompts, prompts, tiny
from transformers import DynamicCache, PreTrainedModel, StaticCache

__all__ = ["one_thread"]

SHORT = {"residual_length": 8, "flush_every": 16}


def _static(model: PreTrainedModel, kind: str, room: int = 250) -> object:
    if kind == "dense":
        return StaticCache(config=model.config, max_cache_len=room)
    return cache_for(model, "kernel", static=True, max_length=room, **SHORT)


def _expected(model: PreTrainedModel, kind: str, ids: torch.Tensor, **options: object) -> torch.Tensor:
    cache = DynamicCache(config=model.config) if kind == "dense" else cache_for(model, "kernel", **SHORT)
    return generate(model, ids, cache, **options)


@pytest.mark.parametrize("kind", ["dense", "mustafar"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_equals_generate(family: str, kind: str) -> None:
    model = tiny(family)
    ids, mask = padded_prompts(3, 90, 20)
    expected = _expected(model, kind, ids, new=60, attention_mask=mask)
    decoder = Decoder(model, _static(model, kind), 3)
    for _ in range(2):  # the second prompt finds the cache of the first
        got = decoder.generate(ids, mask, 60)
        assert torch.equal(got.sequences, expected) and got.stopped == "max_new_tokens"
        assert torch.equal(got.new_tokens, expected[:, 90:])
    other = prompts(3, 40, seed=9)
    assert torch.equal(
        decoder.generate(other, max_new_tokens=20).sequences, _expected(model, kind, other, new=20)
    )


@pytest.mark.parametrize("kind", ["dense", "mustafar"])
def test_stop_tokens(kind: str) -> None:
    """Rows stop at different places; what follows an end token is padding."""
    model = tiny("llama")
    ids, mask = padded_prompts(3, 90, 20)
    free = _expected(model, kind, ids, new=60, attention_mask=mask)[:, 90:]
    eos = [int(free[0, 5]), int(free[1, 30]), int(free[2, 17])]
    expected = _expected(model, kind, ids, new=60, attention_mask=mask, eos_token_id=eos)
    got = Decoder(model, _static(model, kind), 3, eos_token_id=eos, pad_token_id=0).generate(ids, mask, 60)
    assert got.stopped == "eos" and torch.equal(got.sequences, expected)
    one = Decoder(model, _static(model, kind), 3, eos_token_id=eos[0], pad_token_id=0).generate(ids, mask, 60)
    expected = _expected(model, kind, ids, new=60, attention_mask=mask, eos_token_id=eos[0])
    assert torch.equal(one.sequences, expected)


def test_full_cache_returns_the_text_so_far() -> None:
    model, ids = tiny("llama"), prompts(1, 40)
    longer = _expected(model, "mustafar", ids, new=60)
    with pytest.warns(UserWarning, match="stopped after 11 of 60 new tokens, as max_length is 50"):
        got = Decoder(model, _static(model, "mustafar", 50), 1).generate(ids, max_new_tokens=60)
    assert got.stopped == "max_length" and torch.equal(got.sequences, longer[:, :51])


def test_sampling() -> None:
    model, ids = tiny("llama"), prompts(2, 50)
    runs = [
        Decoder(model, _static(model, "mustafar"), 2, sampling=Sampling(seed=seed, **options)).generate(
            ids, max_new_tokens=30
        )
        for seed, options in (
            (1, {"temperature": 1.3}),
            (1, {"temperature": 1.3}),
            (2, {"temperature": 1.3}),
            (3, {"top_k": 1}),
            (3, {"top_p": 1e-6}),
        )
    ]
    same, again, other, greedy, nucleus = (run.new_tokens for run in runs)
    assert torch.equal(same, again) and not torch.equal(same, other)
    decoder = Decoder(model, _static(model, "mustafar"), 2, sampling=Sampling(temperature=1.3, seed=1))
    for _ in range(2):  # what an earlier prompt drew does not matter
        assert torch.equal(decoder.generate(ids, max_new_tokens=30).new_tokens, same)
    firsts = {int(Decoder(model, _static(model, "mustafar"), 2, sampling=Sampling(2.0, seed=seed)).generate(
        ids, max_new_tokens=1).new_tokens[0]) for seed in range(6)}  # fmt: skip
    assert len(firsts) > 1, "the first token is drawn too"
    expected = _expected(model, "mustafar", ids, new=30)[:, 50:]
    assert torch.equal(greedy, expected) and torch.equal(nucleus, expected)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    sampling = Sampling(temperature=2.0, top_k=4, top_p=0.8)
    p = sampling.scores(logits).softmax(-1)
    kept = (logits[0, :4] / 2).softmax(-1)
    count = int((kept.cumsum(0) - kept < 0.8).sum())
    wanted = torch.zeros(5)
    wanted[:count] = kept[:count] / kept[:count].sum()
    assert torch.allclose(p[0], wanted)
    noise = torch.empty(40_000, 5).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = (sampling.scores(logits) - noise.log()).argmax(-1).bincount(minlength=5) / 40_000
    assert torch.allclose(drawn, wanted, atol=0.01)


@pytest.mark.parametrize("vocabulary", [128256, 32000, 8192, 50257, 96])
def test_largest_is_argmax(vocabulary: int) -> None:
    """The first of equal ones and NaN included."""
    scores = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)).mul(2).round()
    scores[1] = 0
    scores[2, vocabulary // 2] = torch.nan
    scores[3, vocabulary // 3 :] = -torch.inf
    assert torch.equal(largest(scores), scores.argmax(-1))


def test_prefill_in_pieces_is_the_same() -> None:
    model = tiny("llama")
    ids, mask = padded_prompts(3, 90, 20)
    whole = Decoder(model, _static(model, "mustafar"), 3).generate(ids, mask, 40)
    pieces = Decoder(model, _static(model, "mustafar"), 3, mlp_tokens=37).generate(ids, mask, 40)
    assert torch.equal(whole.sequences, pieces.sequences)
    assert all("forward" not in layer.mlp.__dict__ for layer in model.model.layers)
    expected = _expected(model, "mustafar", ids, new=40, attention_mask=mask)
    with mlp_in_pieces(model, 37):
        assert torch.equal(_expected(model, "mustafar", ids, new=40, attention_mask=mask), expected)
    with pytest.raises(ValueError, match="at least 1"), mlp_in_pieces(model, 0):
        pass
    with pytest.raises(ValueError, match="no layers"), mlp_in_pieces(torch.nn.Linear(1, 1), 8):
        pass


@pytest.mark.parametrize("kind", ["dense", "mustafar"])
def test_fused_step(kind: str) -> None:
    """Compiled parts give the same tokens with the same code for all layers, and leave no trace."""
    torch._dynamo.reset()
    model, ids = tiny("llama", num_hidden_layers=3), prompts(2, 60)
    expected = _expected(model, kind, ids, new=40)
    cache = _static(model, kind)
    decoder = Decoder(model, cache, 2)
    decoder.prefill(ids)
    torch._dynamo.utils.counters.clear()
    with fused(model, cache, backend="aot_eager"):
        for _ in range(20):
            decoder.step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8, "layers must share their code"
    for _ in range(19):
        decoder.step()
    assert torch.equal(decoder.tokens[:, :40], expected[:, 60:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    attention = [layer.self_attn for layer in model.model.layers]
    assert [part.layer_idx for part in attention] == [0, 1, 2] and "update" not in cache.__dict__


class _EagerGraph:
    """Stands for a CUDA graph: replays by running the step."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.step()


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda g, **options: contextlib.nullcontext(),
        "CUDAGraph": _EagerGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("kind", ["dense", "mustafar"])
def test_capture_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything around a capture, on a CPU: warm-up leaves neither tokens nor counts, one capture serves all."""
    _pretend_cuda(monkeypatch)
    model, ids = tiny("llama"), prompts(2, 60)
    expected = _expected(model, kind, ids, new=40)
    decoder = Decoder(model, _static(model, kind), 2)
    decoder.uses_graph = decoder.fuse = True

    @contextlib.contextmanager
    def broken(*_: object):
        def fail(*_: object, **__: object) -> None:
            raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no compiler"), None)

        monkeypatch.setattr(model.model.layers[0], "forward", fail)
        yield
        monkeypatch.undo()
        _pretend_cuda(monkeypatch)

    monkeypatch.setattr("mustafar.decoding.fused", broken)
    with pytest.warns(UserWarning, match="captured without compiled parts"):
        decoder.capture()
    decoder.graph.step = decoder._step
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, max_new_tokens=40).sequences, expected)
    assert decoder.captures == 1 and decoder.graph.replays == 78


def test_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="static=True"):
        Decoder(model, cache_for(model, "kernel"), 1)
    with pytest.raises(NotImplementedError, match="DynamicLayer"):
        Decoder(model, DynamicCache(config=model.config), 1)
    with pytest.raises(TypeError, match="expected a static MustafarCache"):
        Decoder(model, None, 1)
    with pytest.raises(ValueError, match="on a GPU"):
        Decoder(model, _static(model, "dense"), 1, graph=True)
    decoder = Decoder(model, _static(model, "mustafar", 50), 2)
    ids, mask = prompts(2, 20), torch.ones(2, 20, dtype=torch.long)
    with pytest.raises(ValueError, match="batch size"):
        decoder.generate(prompts(3, 20))
    with pytest.raises(ValueError, match="50 tokens, and the prompt has 51"):
        decoder.generate(prompts(2, 51))
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.generate(ids, max_new_tokens=0)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="padding must be on the left"):
        decoder.generate(ids, mask)
    for options in ({"temperature": 0}, {"top_k": -1}, {"top_p": 0}):
        with pytest.raises(ValueError):
            Sampling(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "sampling", [None, Sampling(temperature=1.2, top_k=30, seed=3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("kind", ["dense", "mustafar"])
def test_captured_equals_eager(kind: str, sampling: Sampling | None, fuse: bool) -> None:
    model = tiny("llama").to("cuda", torch.bfloat16 if fuse else torch.float16)
    ids, mask = (x.cuda() for x in padded_prompts(3, 90, 20))
    results, logits = [], []
    for graph in (False, True):
        decoder = Decoder(model, _static(model, kind), 3, sampling=sampling, graph=graph, fuse=graph and fuse)
        seen = _record_logits(decoder)
        results.append([decoder.generate(ids, mask, 100).sequences for _ in range(2)])
        assert decoder.captures == int(graph)
        decoder.prefill(ids, mask)
        decoder.step()
        logits.append(seen.clone())
    (eager, eager_again), (captured, captured_again) = results
    assert torch.equal(eager, eager_again) and torch.equal(captured, captured_again)
    if fuse:  # rounds otherwise, so that near-ties part the tokens: the first step must agree in its logits
        assert torch.equal(captured[:, :91], eager[:, :91])  # the prompt and what the same prefill chose
        assert (logits[0] - logits[1]).abs().max() <= 0.05 * logits[0].abs().max()
    else:
        assert torch.equal(captured, eager)


def _record_logits(decoder: Decoder) -> torch.Tensor:
    """Where the decoder puts the logits of its last step from now on, float32 [B, vocabulary]."""
    seen = torch.zeros(
        decoder.batch_size, decoder.model.config.vocab_size, dtype=torch.float32, device=decoder.device
    )
    choose = decoder._choose

    def record(logits: torch.Tensor) -> None:
        seen.copy_(logits)
        choose(logits)

    decoder._choose = record
    return seen


def test_fused_logits() -> None:
    """What the GPU test above holds compiled parts to, here with the compiler's front end alone."""
    torch._dynamo.reset()
    model = tiny("llama")
    ids, mask = padded_prompts(3, 90, 20)
    decoder = Decoder(model, _static(model, "mustafar"), 3)
    seen, found = _record_logits(decoder), []
    for compiled in (False, True):
        decoder.prefill(ids, mask)
        with fused(model, decoder.cache, backend="aot_eager") if compiled else contextlib.nullcontext():
            decoder.step()
        found.append(seen.clone())
    assert found[0].abs().max() > 1 and torch.allclose(*found, atol=1e-4)
