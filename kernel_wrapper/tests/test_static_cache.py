"""The static cache holds what the dynamic one holds and gives its tokens, eagerly, compiled and reused."""

from __future__ import annotations

import pytest
import torch
from mustafar import CacheDoesNotFit, StopAtMaxLength, ops, room
from mustafar.cache import MustafarCache
from mustafar.static import StaticMustafarLayer
from tiny_models import cache_for, generate, one_thread, padded_prompts, prompts, tiny
from transformers import CompileConfig, LlamaConfig

__all__ = ["one_thread"]

SHORT = {"residual_length": 8, "flush_every": 16}
FAMILIES = ("llama", "mistral", "mistral_sliding", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=str)
def test_tokens_equal_dynamic_and_simulated(family: str, options: dict) -> None:
    ids, mask = padded_prompts(2, 101, 30)
    model = tiny(family)
    batch = 2 * options.get("num_beams", 1)
    caches = [
        cache_for(model, "simulate", **SHORT),
        cache_for(model, "kernel", **SHORT),
        cache_for(model, "kernel", static=True, max_length=200, **SHORT),
    ]
    simulated, dynamic, static = (
        generate(model, ids, cache, new=60, attention_mask=mask, **options) for cache in caches
    )
    assert torch.equal(dynamic, simulated) and torch.equal(static, dynamic)
    assert caches[2].layers[0].batch_size == batch
    if "num_beams" not in options:
        caches[2].reset()
        assert torch.equal(generate(model, ids, caches[2], new=60, attention_mask=mask, **options), static)


@pytest.mark.parametrize(
    "residual,flush,length",
    [(0, 1, 97), (0, 1, 1), (0, 64, 33), (1, 7, 97), (40, 3, 1), (150, 20, 97), (32, 256, 97)],
)
def test_timings(residual: int, flush: int, length: int) -> None:
    settings = {"residual_length": residual, "flush_every": flush}
    model, ids = tiny("llama"), prompts(1, length)
    new = 150 if residual + flush < 150 else 300  # two flushes at least
    dynamic = generate(model, ids, cache_for(model, "kernel", **settings), new=new)
    static = cache_for(model, "kernel", static=True, max_length=length + new, **settings)
    assert torch.equal(generate(model, ids, static, new=new), dynamic)


def test_one_graph_and_no_recompiles() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids, mask = padded_prompts(2, 101, 30)
    model = tiny("llama")
    expected = generate(model, ids, cache_for(model, "kernel", **SHORT), new=60, attention_mask=mask)
    config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    cache = cache_for(model, "kernel", static=True, max_length=300, **SHORT)
    for _ in range(2):
        cache.reset()
        got = generate(model, ids, cache, new=60, attention_mask=mask, compile_config=config)
        assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_turns() -> None:
    """Turns that fit the window, one that does not, and one of a single token."""
    model = tiny("llama")
    results = []
    for static in ({}, {"static": True, "max_length": 400}):
        cache = cache_for(model, "kernel", residual_length=8, flush_every=16, **static)
        ids = prompts(2, 70)
        for turn, added in enumerate((0, 5, 50, 1)):
            ids = torch.cat([ids, prompts(2, added, seed=turn + 5)], dim=1)
            ids = generate(model, ids, cache, new=21)
        results.append(ids)
    assert torch.equal(*results)


def _layers(settings: dict, device: str) -> list:
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=80
    )
    caches = [MustafarCache(config, 0.7, 0.5, **settings) for _ in range(2)]
    caches[1] = MustafarCache(config, 0.7, 0.5, static=True, max_length=512, **settings)
    return [cache.layers[0] for cache in caches]


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("residual,flush", [(8, 16), (100, 70), (0, 1), (32, 256)])
def test_holds_the_same_bits(target, residual: int, flush: int, capture: bool) -> None:
    """Slices and window after every kind of flush, NaN and ties included; on a GPU in a captured graph too."""
    device, dtype = target
    if capture and device == "cpu":
        pytest.skip("graphs are for GPUs")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 2, 420, 80, generator=g).mul(4).round().div(4)  # many ties
    x[0, 0, 0, ::50, 3] = torch.nan
    x[1, :, :, 7] = 0
    keys, values = x.to(device, dtype)
    dynamic, static = _layers({"residual_length": residual, "flush_every": flush}, device)
    for layer in (dynamic, static):
        layer.update(keys[:, :, :130], values[:, :, :130])
    k, v = keys[:, :, :1].clone(), values[:, :, :1].clone()
    graph = None
    if capture:
        state = [t.clone() for t in (static.counters.state, static.counters.lengths, static.counters.total)]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            static.update(k, v)
        for tensor, saved in zip(
            (static.counters.state, static.counters.lengths, static.counters.total), state, strict=True
        ):
            assert torch.equal(tensor, saved)
    for t in range(130, 420):
        dynamic.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        if graph is None:
            static.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        else:
            k.copy_(keys[:, :, t : t + 1])
            v.copy_(values[:, :, t : t + 1])
            graph.replay()
    packed, window, pruned = static.counters.read()
    assert packed == dynamic.key_history.packed_tokens and pruned == dynamic.key_history.pruned
    assert static.counters.lengths.tolist() == [[packed, window]] * 2 and int(static.counters.total) == 420
    for mine, theirs in zip((static.key_history, static.value_history), dynamic.histories, strict=True):
        a, b = mine.dense(packed, mine.window[:, :, :window]), theirs.dense()
        assert torch.equal(a.nan_to_num(99), b.nan_to_num(99))
        assert torch.equal(mine.store.bitmap[:, :, : packed // 64], theirs.packed().bitmap)


def test_full() -> None:
    model, ids = tiny("llama"), prompts(1, 40)
    longer = generate(model, ids, cache_for(model, "kernel", **SHORT), new=30)
    cache = cache_for(model, "kernel", static=True, max_length=50, **SHORT)
    with pytest.raises(ValueError, match="max_length: the static cache has room for 50 tokens"):
        generate(model, ids, cache, new=30)
    cache.reset()
    text = generate(model, ids, cache, new=30, stopping_criteria=[StopAtMaxLength(cache)])
    assert torch.equal(text, longer[:, :51])
    with pytest.raises(ValueError, match="50 tokens, and 0 \\+ 51 are needed"):
        generate(model, prompts(1, 51), cache_for(model, "kernel", static=True, max_length=50), new=1)


def test_tokens_beyond_the_room_are_dropped() -> None:
    _, layer = _layers({"residual_length": 8, "flush_every": 16}, "cpu")
    x = torch.randn(1, 2, 511, 80)
    layer.update(x, x)
    for _ in range(5):
        layer.update(x[:, :, :1], x[:, :, :1])
    assert layer.counters.state[ops.WINDOW_OVERFLOW] == 4 and int(layer.counters.total) == 512


@pytest.mark.parametrize(
    "options,error,match",
    [
        ({"static": True}, ValueError, "needs max_length"),
        ({"max_length": 10}, ValueError, "static=True"),
        ({"static": True, "max_length": 0}, ValueError, "max_length"),
        ({"static": True, "max_length": 9, "backend": "simulate"}, ValueError, "kernel"),
        ({"static": True, "max_length": 9, "k_rule": "ThinK"}, NotImplementedError, "Kt_Mag"),
    ],
)
def test_refused(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MustafarCache(tiny("llama").config, **options)


def test_refused_later() -> None:
    with pytest.raises(NotImplementedError, match="several kinds"):
        MustafarCache(tiny("qwen3_mixed").config, static=True, max_length=100)
    model = tiny("llama")
    cache = cache_for(model, "kernel", static=True, max_length=100)
    generate(model, prompts(1, 20), cache, new=5)
    for call in (
        lambda: cache.crop(-1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.layers[0].offload(),
    ):
        with pytest.raises(NotImplementedError):
            call()
    cache.reset()
    with pytest.raises(ValueError, match="batch of 1"):
        generate(model, prompts(2, 20), cache, new=5)
    ids, mask = prompts(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, -3] = 0  # a hole
    with pytest.raises(ValueError, match="left padding"):
        generate(model, ids, cache_for(model, "kernel", static=True, max_length=100), attention_mask=mask)


def test_memory_is_that_of_the_format() -> None:
    model = tiny("mistral")  # head_dim 128
    cache = cache_for(model, "kernel", sparsity=0.7, static=True, max_length=1024, **SHORT)
    generate(model, prompts(2, 600), cache, new=8)
    memory = cache.memory()
    rows = 2 * 2 * 2 * 2  # layers, keys and values, batch, KV heads
    window = SHORT["residual_length"] + SHORT["flush_every"] + 63
    assert memory["allocated_bytes"] == rows * (1024 * (16 + 4 * 40) + window * 128 * 4)
    keys = torch.empty(2, 2, 1, 128)
    assert memory["allocated_bytes"] == 2 * room.static_layer_bytes(cache.settings, keys, 1024)
    assert memory["compressed_bytes"] == rows * 576 * (16 + 4 * 40)
    assert memory["dense_equivalent_bytes"] == rows * 607 * 128 * 4


def test_no_room_names_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four layers have their memory, then the GPU has room for 1.25 more: 3.25 / 4 of the batch fits."""
    model = tiny("llama", num_hidden_layers=4)
    ids = prompts(8, 20)
    layer = room.static_layer_bytes(cache_for(model, "kernel").settings, torch.empty(8, 2, 1, 64), 200)
    take = StaticMustafarLayer._take_memory

    def full(self, *others) -> None:
        if self.layer_idx == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        take(self, *others)

    monkeypatch.setattr(room, "free_bytes", lambda device: layer * 5 // 4)
    monkeypatch.setattr(StaticMustafarLayer, "_take_memory", full)
    with pytest.raises(
        CacheDoesNotFit, match=r"batch of 8 and max_length 200 .* batch with room for it is 6,"
    ) as error:
        generate(model, ids, cache_for(model, "kernel", static=True, max_length=200), new=2)
    assert error.value.largest_batch == 6 and isinstance(error.value, torch.OutOfMemoryError)
    monkeypatch.setattr(room, "free_bytes", lambda device: 0)
    with pytest.raises(CacheDoesNotFit, match="one sequence is too much"):
        generate(model, ids[:1], cache_for(model, "kernel", static=True, max_length=200), new=2)


def test_opcheck(target) -> None:
    device, dtype = target
    _, layer = _layers({"residual_length": 8, "flush_every": 16}, device)
    x = torch.randn(2, 2, 100, 80, device=device).to(dtype)
    layer.update(x, x)
    c, keys, values = layer.counters, layer.key_history, layer.value_history
    torch.library.opcheck(
        torch.ops.mustafar.window_advance.default, (c.state, c.lengths, c.total, 8, 16, 512)
    )
    stores = (keys.store.bitmap, keys.store.values, values.store.bitmap, values.store.values)
    windows = (keys.window, values.window)
    torch.library.opcheck(
        torch.ops.mustafar.window_append.default,
        (x[:, :, :1], x[:, :, :1], *stores, *windows, c.state, keys.kept, values.kept),
    )
    with pytest.raises(ValueError, match=r"k.shape: expected one token"):
        torch.ops.mustafar.window_append(x, x, *stores, *windows, c.state, keys.kept, values.kept)
    with pytest.raises(ValueError, match=r"v.*slots for 3 values"):
        torch.ops.mustafar.window_append(x[:, :, :1], x[:, :, :1], *stores, *windows, c.state, keys.kept, 3)
    with pytest.raises(ValueError, match="state"):
        torch.ops.mustafar.window_advance(c.state[:3], c.lengths, c.total, 8, 16, 512)
