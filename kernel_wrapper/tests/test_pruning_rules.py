"""The rules in the cache: against each one's definition written out here, and simulated against the kernels."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from mustafar.attention import mustafar_attention
from mustafar.cache import MustafarCache
from mustafar.pruning import RULES, Pruning, get_rule
from tiny_models import cache_for, generate, one_thread, prompts, tiny
from transformers import LlamaConfig, PreTrainedModel

__all__ = ["one_thread"]

BATCH, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 24
PADDING = (0, 37)  # of the two rows: into the pruned tokens, over a group of 16
OBSERVING = {"Kt_Opt", "ThinK", "Vc_Opt", "ThinV"}
PAIRS = [
    ("Kt_Mag", "Vt_Opt"),
    ("Kt_Mag", "Vc_Mag"),
    ("Kt_Opt", "Vt_Mag"),
    ("Kt_Opt", "Vc_Opt"),
    ("ThinK", "Vc_Opt"),
    ("ThinK", "ThinV"),
]


def highest(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Indices of those of a vector that stay."""
    kept = len(score) - math.floor(sparsity * len(score))
    return score.sort(descending=True, stable=True).indices[:kept]


def weights_by_hand(q: torch.Tensor, k: torch.Tensor, position: int, start: int, window: int) -> torch.Tensor:
    """Attention of one query at `position` over keys k [T, D], zero where it does not look."""
    first = max(start, position - window + 1) if window else start
    weights = torch.zeros(len(k), dtype=k.dtype)
    weights[first : position + 1] = (k[first : position + 1] @ q / math.sqrt(len(q))).softmax(0)
    return weights


def keep_by_hand(
    name: str,
    x: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    start: int,
    sparsity: float,
    group: int,
    window: int = 0,
) -> torch.Tensor:
    """What rule `name` keeps of x [L, D], the tokens from position `first` on of one KV head of one sequence.

    queries [G, T, D] are all until now, keys [T, D] those they attended to.
    """
    tokens, (length, channels) = keys.shape[0], x.shape
    recent = range(max(start, tokens - 32), tokens)
    keep = torch.zeros(x.shape, dtype=torch.bool)
    if name in ("Kt_Mag", "Vt_Mag", "Vt_Opt", "Kt_Opt"):
        weight = torch.ones(channels, dtype=x.dtype)
        if name == "Kt_Opt":
            weight = sum(queries[g, t].abs() for g in range(len(queries)) for t in recent)
        for t in range(length):
            keep[t, highest(x[t].abs() * weight, sparsity)] = True
    elif name in ("Vc_Mag", "Vc_Opt"):
        weight = torch.ones(length, dtype=x.dtype)
        if name == "Vc_Opt":
            attention = sum(
                weights_by_hand(queries[g, t], keys, t, start, window)
                for g in range(len(queries))
                for t in recent
            )
            weight = attention[first : first + length]
        for c in range(channels):
            for t in range(0, length, group):
                part = slice(t, t + group)
                keep[t + highest(x[part, c].abs() * weight[part], sparsity), c] = True
    else:  # ThinK: the Frobenius norm of what channel j adds to the product of queries and keys
        held = x[max(0, start - first) :]
        score = held.norm(dim=0)
        if name == "ThinK":
            q = torch.stack([queries[g, t] for g in range(len(queries)) for t in recent])
            score = torch.stack(
                [torch.linalg.matrix_norm(torch.outer(q[:, j], held[:, j])) for j in range(channels)]
            )
        keep[:, highest(score, sparsity)] = True
    return keep


class ByHand:
    """The cache of one layer as tensors, pruned by the definitions above when the cache should."""

    def __init__(
        self,
        rules: tuple[str, str],
        sparsities: tuple[float, float],
        settings: dict,
        padding: tuple = PADDING,
    ) -> None:
        self.rules, self.sparsities, self.settings, self.padding = rules, sparsities, settings, padding
        self.q = torch.zeros(BATCH, KV_HEADS * GROUP, 0, HEAD_DIM)
        self.held = [torch.zeros(BATCH, KV_HEADS, 0, HEAD_DIM) for _ in range(2)]
        self.pruned = 0

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        tokens, residual = self.held[0].shape[2], self.settings["residual_length"]
        if tokens and tokens - self.pruned >= residual + self.settings["flush_every"]:
            self._prune(tokens - residual)
        self.q = torch.cat([self.q, q], dim=2)
        self.held = [torch.cat(pair, dim=2) for pair in zip(self.held, (k, v), strict=True)]
        if not tokens:
            self._prune(k.shape[2] - residual)

    def _prune(self, pruned: int) -> None:
        keys, after = self.held[0].double(), [x.clone() for x in self.held]
        for x, rule, sparsity in zip(after, self.rules, self.sparsities, strict=True):
            for b in range(BATCH):
                for h in range(KV_HEADS):
                    part = x[b, h, self.pruned : pruned]
                    keep = keep_by_hand(
                        rule,
                        part.double(),
                        self.q[b, h * GROUP : (h + 1) * GROUP].double(),
                        keys[b, h],
                        self.pruned,
                        self.padding[b],
                        sparsity,
                        self.settings["group_size"],
                    )
                    part[~keep] = 0
        self.held, self.pruned = after, pruned


def rows(tokens: int) -> tuple[torch.Tensor, ...]:
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(BATCH, count, tokens, HEAD_DIM) for count in heads)


def step(
    cache: MustafarCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: tuple = PADDING
) -> torch.Tensor:
    """One layer of a forward pass, with the left padding's mask."""
    added, total = k.shape[2], cache.get_seq_length() + k.shape[2]
    position = torch.arange(total)
    mask = position >= torch.tensor(padding)[:, None, None, None]
    mask = mask & (position <= torch.arange(total - added, total)[:, None])
    module = SimpleNamespace(num_key_value_groups=GROUP, is_causal=True, training=False)
    return mustafar_attention(module, q, *cache.update(k, v, 0), mask)[0]


def held(cache: MustafarCache) -> list[torch.Tensor]:
    return [history.dense() for history in cache.layers[0].histories]


def small_cache(backend: str, k_rule: str, v_rule: str, *sparsity: float, **settings: int) -> MustafarCache:
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, head_dim=HEAD_DIM, num_hidden_layers=1)
    return MustafarCache(config, *sparsity, backend=backend, k_rule=k_rule, v_rule=v_rule, **settings)


def test_which_rules_there_are() -> None:
    assert [r for r in RULES if RULES[r].tensor == "K"] == ["Kt_Mag", "Kt_Opt", "ThinK"]
    assert [r for r in RULES if RULES[r].tensor == "V"] == ["Vt_Mag", "Vt_Opt", "Vc_Mag", "Vc_Opt", "ThinV"]
    assert {r for r in RULES if RULES[r].observes} == OBSERVING
    assert {r for r in RULES if not RULES[r].uniform} == {"Vc_Mag", "Vc_Opt"}


@pytest.mark.parametrize("sparsities", [(0.5, 0.7), (0.95, 0.3)], ids=str)
@pytest.mark.parametrize("rules", PAIRS, ids="+".join)
def test_both_backends_prune_as_defined(rules: tuple[str, str], sparsities: tuple[float, float]) -> None:
    """A left-padded prompt of 101 tokens, then decoding across three flushes: the same values are kept as by
    the definitions, by both backends exactly, and attention over them is the same."""
    torch.manual_seed(0)
    settings = {"residual_length": 32, "flush_every": 40, "group_size": 16}
    caches = [small_cache(backend, *rules, *sparsities, **settings) for backend in ("simulate", "kernel")]
    expected = ByHand(rules, sparsities, settings)
    for number in range(131):
        new = rows(1 if number else 101)
        expected.add(*new)
        outputs = [step(cache, *new) for cache in caches]
        torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-4, atol=1e-5)
        seen = slice(0 if number else PADDING[1], None)  # a prompt's padding attends to nothing
        torch.testing.assert_close(outputs[0][1, seen], outputs[1][1, seen], rtol=1e-4, atol=1e-5)
        if number % 10 in (0, 1) or number == 130:
            for got in map(held, caches):
                assert all(torch.equal(*pair) for pair in zip(got, expected.held, strict=True)), number
    assert expected.pruned == 69 + 3 * 40
    packed = caches[1].layers[0].histories
    assert [h.packed().is_uniform for h in packed] == [RULES[rule].uniform for rule in rules]
    assert packed[0].packed_tokens == packed[1].packed_tokens == 128


def test_think_keeps_whole_channels_of_each_flush() -> None:
    torch.manual_seed(1)
    cache = small_cache("kernel", "ThinK", "ThinV", 0.5, 0.5, flush_every=40)
    for number in range(60):
        step(cache, *rows(1 if number else 101))
    for x in held(cache):
        prompt, flushed = (x[:, :, :69] != 0), (x[:, :, 69:109] != 0)
        for kept in (prompt, flushed):
            assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
            assert torch.equal(kept[:, :, 0].sum(-1), torch.full((BATCH, KV_HEADS), HEAD_DIM // 2))
        assert not torch.equal(prompt[:, :, 0], flushed[:, :, 0])


@pytest.mark.parametrize("rules", [("Kt_Opt", "Vc_Opt"), ("ThinK", "ThinV")], ids="+".join)
def test_queries_of_padding_do_not_count(rules: tuple[str, str]) -> None:
    """A row of fewer than 32 tokens, with a local window that is shorter still."""
    torch.manual_seed(4)
    settings = {"residual_length": 8, "flush_every": 40, "group_size": 16}
    cache = small_cache("kernel", *rules, 0.5, 0.5, **settings)
    expected = ByHand(rules, (0.5, 0.5), settings, padding=(0, 80))
    prompt = rows(101)
    expected.add(*prompt)
    step(cache, *prompt, padding=(0, 80))
    for got, wanted in zip(held(cache), expected.held, strict=True):
        for row, start in enumerate(expected.padding):
            assert torch.equal(got[row, :, start:], wanted[row, :, start:])


def test_a_sliding_window_hides_tokens_from_the_attention_score() -> None:
    torch.manual_seed(2)
    q, k, v = (x[:1] for x in rows(101))
    layer = small_cache("simulate", "Kt_Mag", "Vc_Opt", 0.0, 0.5, residual_length=8).layers[0]
    layer.update(k, v)
    layer.observe(q, None, None, sliding_window=50)
    for h in range(KV_HEADS):
        keep = keep_by_hand(
            "Vc_Opt", v[0, h, :93].double(), q[0, h * GROUP : (h + 1) * GROUP].double(), k[0, h].double(),
            first=0, start=0, sparsity=0.5, group=32, window=50,
        )  # fmt: skip
        assert torch.equal(layer.value_history.dense()[0, h, :93] != 0, keep)


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
def test_crop_and_batch_operations_keep_the_queries_of_the_tokens(backend: str) -> None:
    """Tokens that are cropped away, and rows that are replaced, leave no trace in later scores."""
    torch.manual_seed(3)
    settings = {"flush_every": 20}  # less than 32: the first flush scores by queries from before the detour
    prompt, detour, rest = rows(101), rows(9), [rows(1) for _ in range(45)]
    order = torch.tensor([1, 1])
    results = []
    for wander in (False, True):
        cache = small_cache(backend, "Kt_Opt", "Vc_Opt", 0.5, 0.5, **settings)
        step(cache, *(prompt if wander else (x[order] for x in prompt)))
        cache.layers[0].observer.starts = torch.tensor(PADDING)[torch.arange(2) if wander else order]
        if wander:
            step(cache, *detour)
            cache.layers[0].crop(torch.tensor(-9))
            cache.layers[0].reorder_cache(order)
            # The row that both now continue was pruned with its own padding.
            assert cache.layers[0].observer.starts.tolist() == [PADDING[1]] * 2
        layer = cache.layers[0]
        for q, k, v in rest:
            layer.update(k, v)
            layer.observe(q)
        results.append([x[1] for x in held(cache)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def assert_backends_equal(family: str, ids: torch.Tensor, settings: dict, **options: object) -> torch.Tensor:
    """As in test_cache_generate.py: float32 sums in another order may flip a near-tie with one model."""

    def run(model: PreTrainedModel, backend: str, sparsity: float = 0.6) -> torch.Tensor:
        short = {"residual_length": 32, "flush_every": 16, "group_size": 16}
        return generate(model, ids, cache_for(model, backend, sparsity, **short, **settings), **options)

    for seed in range(3):
        model = tiny(family, seed)
        first, second = run(model, "simulate"), run(model, "kernel")
        if torch.equal(first, second):
            return first
    pytest.fail("tokens differ with every model")


@pytest.mark.parametrize("rules", PAIRS, ids="+".join)
def test_generate_with_left_padding(rules: tuple[str, str]) -> None:
    ids = prompts(2, 101)
    ids[1, :45] = 0
    settings = dict(zip(("k_rule", "v_rule"), rules, strict=True))
    assert_backends_equal("llama", ids, settings, attention_mask=(ids != 0).long())


@pytest.mark.parametrize("mode", ["beam", "chunks", "assisted", "sliding", "qwen3_mixed"])
def test_generate_in_other_ways(mode: str) -> None:
    options = {
        "beam": {"num_beams": 3},
        "chunks": {"prefill_chunk_size": 24},
        "assisted": {"prompt_lookup_num_tokens": 5, "eos_token_id": 0},
    }.get(mode, {})
    ids = prompts(1 if mode == "assisted" else 2, 101)
    if mode == "assisted":
        ids[:, 51:] = ids[:, :50]  # so that prompt lookup finds candidates
    family = {"sliding": "mistral_sliding", "qwen3_mixed": "qwen3_mixed"}.get(mode, "llama")
    assert_backends_equal(family, ids, {"k_rule": "ThinK", "v_rule": "Vc_Opt"}, **options)


@pytest.mark.parametrize("backend", ["simulate", "kernel"])
def test_queries_that_do_not_come_are_missed(backend: str) -> None:
    cache = small_cache(backend, "Kt_Opt", "ThinV", 0.5, 0.5)
    _, k, v = rows(50)
    cache.update(k, v, 0)
    with pytest.raises(RuntimeError, match=r'Kt_Opt and ThinV score .* must be "mustafar", also to simulate'):
        cache.update(k, v, 0)
    cache.reset()
    cache.update(k, v, 0)


def test_a_rule_that_observes_needs_a_window() -> None:
    with pytest.raises(ValueError, match=r"rule Kt_Opt scores by recent queries.* need none: Kt_Mag"):
        Pruning(get_rule("Kt_Opt"), 0.5).prune(torch.randn(1, 1, 4, 8))


def test_only_rules_that_observe_change_a_simulated_model() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    cache_for(model, "simulate", v_rule="Vc_Mag")
    assert model.config._attn_implementation == before != "mustafar"
    cache_for(model, "simulate", v_rule="Vc_Opt")
    assert model.config._attn_implementation == "mustafar"
