"""Every op against its float32 twin in `mustafar.reference`, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from cases import PATTERNS, assert_as_accurate, assert_same_bits, compressed, rows
from mustafar import num_kept, ops, reference
from mustafar.format import CompressedTensor

SHAPES = [(1, 1, 1, 64), (2, 3, 65, 128), (1, 2, 200, 256), (2, 1, 130, 80), (1, 1, 64, 96), (1, 2, 63, 112)]
LAYOUTS = ("uniform", "general")


def same_tensor(got: CompressedTensor, expected: CompressedTensor) -> None:
    got.validate()
    assert (got.tokens, got.head_dim) == (expected.tokens, expected.head_dim)
    for part in ("bitmap", "values", "offsets", "widths"):
        a, b = getattr(got, part), getattr(expected, part)
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compression_matches_reference(target, shape, pattern):
    device, dtype = target
    x = rows(pattern, *shape).to(dtype)
    for sparsity in (0.0, 0.5, 0.7, 0.95):
        k = num_kept(sparsity, shape[3])
        same_tensor(ops.prune_compress(x.to(device), k), reference.prune_compress(x, k))
    expected = reference.compress(x)
    got = ops.compress(x.to(device))
    same_tensor(got, expected)
    assert_same_bits(ops.decompress(got), torch.where(x != 0, x, 0))


def test_compression_of_special_values(target):
    """NaN outranks infinity, all NaN tie, ties go to the lowest channel, payloads survive."""
    device, dtype = target
    x = rows("normal", 1, 2, 70, 128).to(dtype)
    x[0, 0, 3, 100] = math.nan
    x[0, 0, 4, [5, 90]] = torch.tensor([-math.nan, math.inf], dtype=dtype)
    x[0, 0, 5] = math.nan
    x[0, 1, 6] = math.inf
    x[0, 1, 7, 20:60] = -math.inf
    x[0, 1, 8] = -0.0
    x[0, 1, 69, 127] = torch.finfo(dtype).smallest_normal / 2  # a subnormal
    for k in (1, 2, 39, 64, 128):
        same_tensor(ops.prune_compress(x.to(device), k), reference.prune_compress(x, k))
    same_tensor(ops.compress(x.to(device)), reference.compress(x))


def test_prune_compress_reads_strided_rows(target):
    device, dtype = target
    x = (
        rows("normal", 2, 70, 3, 64).to(dtype).to(device).transpose(1, 2)
    )  # [2, 3, 70, 64], heads inside tokens
    assert not x.is_contiguous()
    same_tensor(ops.prune_compress(x, 20), reference.prune_compress(x.cpu(), 20))
    same_tensor(ops.compress(x), reference.compress(x.cpu()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decompress_reads_views(target, layout):
    """A cache passes the filled part of a larger store."""
    device, dtype = target
    c = compressed(rows("full_and_empty", 2, 2, 256, 128).to(dtype), layout, 39, device)
    part = narrowed(c, 130)
    assert_same_bits(ops.decompress(part), reference.decompress(c.to("cpu"))[:, :, :130])


def narrowed(c: CompressedTensor, tokens: int) -> CompressedTensor:
    """The first `tokens` of `c`, whole slices kept, as views."""
    s = -(-tokens // 64)
    values = c.values[:, :, :s] if c.is_uniform else c.values
    tables = (None, None) if c.is_uniform else (c.offsets[:, :, :s], c.widths[:, :, :s])
    return CompressedTensor(c.bitmap[:, :, :s], values, *tables, tokens, c.head_dim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spmv(target, shape, group, layout):
    device, dtype = target
    batch, heads, tokens, head_dim = shape
    pattern = "outliers" if group == 4 else "full_and_empty"
    c = compressed(rows(pattern, *shape).to(dtype), layout, num_kept(0.7, head_dim), device)
    dense = reference.decompress(c.to("cpu")).to(device).repeat_interleave(group, 1)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, heads * group, head_dim, generator=g).to(dtype).to(device)
    peer = torch.einsum("bhd,bhtd->bht", q, dense)
    assert_as_accurate(ops.key_scores(q, c), peer, reference.key_scores(q.cpu(), c.to("cpu")))
    p = torch.randn(batch, heads * group, tokens, generator=g).softmax(-1).to(dtype).to(device)
    peer = torch.einsum("bht,bhtd->bhd", p, dense)
    assert_as_accurate(ops.value_output(p, c), peer, reference.value_output(p.cpu(), c.to("cpu")))


def attention_case(
    device, dtype, *, batch=2, heads=2, group=4, tokens=130, head_dim=128, window=40, **options
):
    """Arguments of decode_attention, and the same on the CPU."""
    pattern, k_layout = options.get("pattern", "outliers"), options.get("k_layout", "uniform")
    v_layout = options.get("v_layout", k_layout)
    shape = (batch, heads, tokens, head_dim)
    k = compressed(rows(pattern, *shape).to(dtype), k_layout, num_kept(0.7, head_dim), "cpu")
    v = compressed(rows("normal", *shape, seed=1).to(dtype), v_layout, num_kept(0.5, head_dim), "cpu")
    g = torch.Generator().manual_seed(2)
    q = torch.randn(batch, heads * group, head_dim, generator=g).to(dtype)
    windows = torch.randn(2, batch, heads, window, head_dim, generator=g).to(dtype)
    lengths = options.get("lengths", [[tokens, window]] * batch)
    starts = options.get("starts")
    host = {
        "q": q, "k": k, "v": v, "k_window": windows[0], "v_window": windows[1],
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "starts": None if starts is None else torch.tensor(starts, dtype=torch.int32),
        "sliding_window": options.get("sliding_window", 0),
    }  # fmt: skip
    there = {
        n: a.to(device) if isinstance(a, torch.Tensor | CompressedTensor) else a for n, a in host.items()
    }
    return there, host


def same_dtype_attention(host: dict, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch computes in `dtype` for the same step, step by step as eager attention does."""
    size = int(host["lengths"].sum(-1).max())
    group = host["q"].shape[1] // host["k"].shape[1]
    seen = reference.visible(host["lengths"], host["starts"], host["sliding_window"], size)

    def joined(c, window):
        out = torch.zeros(*c.shape[:2], size, c.head_dim, dtype=dtype)
        for b, (packed, recent) in enumerate(host["lengths"].tolist()):
            out[b, :, :packed] = reference.decompress(c)[b, :, :packed]
            out[b, :, packed : packed + recent] = window[b, :, :recent]
        return out.repeat_interleave(group, 1)

    scores = torch.einsum("bhd,bhtd->bht", host["q"], joined(host["k"], host["k_window"]))
    scores = (scores * host["q"].shape[-1] ** -0.5).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.float().softmax(-1).nan_to_num().to(dtype)
    return torch.einsum("bht,bhtd->bhd", weights, joined(host["v"], host["v_window"]))


ATTENTION_CASES = {
    "basic": {},
    "head_dim_64": {"head_dim": 64},
    "head_dim_256": {"head_dim": 256},
    "head_dim_80": {"head_dim": 80},
    "one_token": {"tokens": 1, "window": 0},
    "only_window": {"tokens": 0, "window": 7},
    "empty_window": {"window": 0},
    "long": {"tokens": 1500, "batch": 1, "heads": 1},
    "group_1": {"group": 1},
    "group_5": {"group": 5},
    "group_7": {"group": 7},
    "group_8": {"group": 8},
    "group_12": {"group": 12},
    "general": {"k_layout": "general", "pattern": "full_and_empty"},
    "long_runs": {"k_layout": "general", "pattern": "long_runs"},
    "one_word": {"k_layout": "general", "pattern": "one_word"},
    "zero_keys": {"k_layout": "general", "v_layout": "uniform", "pattern": "zeros"},
    "mixed_layouts": {"k_layout": "uniform", "v_layout": "general"},
    "lengths_differ": {"lengths": [[130, 3], [17, 40]]},
    "nothing_visible": {"lengths": [[0, 0], [17, 40]]},
    "left_padding": {"starts": [5, 100]},
    "padding_into_window": {"starts": [140, 0]},
    "sliding": {"sliding_window": 64},
    "sliding_in_window": {"sliding_window": 9, "starts": [3, 0]},
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_decode_attention(target, case):
    device, dtype = target
    there, host = attention_case(device, dtype, **ATTENTION_CASES[case])
    exact = reference.decode_attention(**host)
    got = ops.decode_attention(**there)
    assert_as_accurate(got, same_dtype_attention(host, dtype), exact)
    assert_same_bits(got, ops.decode_attention(**there))  # deterministic


@pytest.mark.parametrize("where", ["visible_key", "visible_value", "padding", "window", "past_window"])
def test_decode_attention_nan(target, where):
    """A visible NaN reaches the output as in dense attention; a masked one never does."""
    device, dtype = target
    there, host = attention_case(device, dtype, batch=1, group=2, starts=[10], lengths=[[130, 30]])
    for args in (host, there):
        for name in ("k", "v"):
            dense = reference.decompress(host[name]).clone()
            if where == "padding":
                dense[:, 0, 2] = math.nan
            elif where == f"visible_{'key' if name == 'k' else 'value'}":
                dense[:, 0, 50, 3] = math.nan
            args[f"new_{name}"] = reference.compress(dense).to(args["q"].device)
        for name in ("k", "v"):
            args[name] = args.pop(f"new_{name}")
            if where == "window" and name == "k":
                args["k_window"][:, 0, 4, 1] = math.nan
            if where == "past_window":
                args[f"{name}_window"][:, 0, 35] = math.nan
    exact = reference.decode_attention(**host)
    got = ops.decode_attention(**there).cpu()
    assert torch.equal(got.isnan(), exact.isnan())
    expect_nan = where in ("visible_key", "visible_value", "window")
    assert bool(exact.isnan().any()) == expect_nan
    assert_as_accurate(
        got.nan_to_num(nan=0.0),
        same_dtype_attention(host, dtype).nan_to_num(nan=0.0),
        exact.nan_to_num(nan=0.0),
    )


def test_decode_attention_overflow(target):
    """Scores far apart: the softmax neither overflows nor loses the largest."""
    device, dtype = target
    there, host = attention_case(device, dtype, tokens=200)
    for args in (host, there):
        args["q"] = args["q"] * 100
    assert_as_accurate(
        ops.decode_attention(**there), same_dtype_attention(host, dtype), reference.decode_attention(**host)
    )


def test_opcheck(target):
    """Schema, fake and dispatch agree, so torch.compile and export can trace the ops."""
    device, dtype = target
    x = rows("full_and_empty", 2, 2, 70, 64).to(dtype).to(device)
    namespace = torch.ops.mustafar
    torch.library.opcheck(namespace.prune_compress, (x, 20))
    torch.library.opcheck(namespace.compress, (x,))
    there, _ = attention_case(device, dtype, k_layout="uniform", v_layout="general")
    for c in (there["k"], there["v"]):
        parts = (c.bitmap, c.values, c.offsets, c.widths)
        torch.library.opcheck(namespace.decompress, (*parts, c.tokens, c.head_dim))
        torch.library.opcheck(namespace.key_scores, (there["q"], *parts, c.tokens))
        p = torch.rand(*there["q"].shape[:2], c.tokens, device=device).to(dtype)
        torch.library.opcheck(namespace.value_output, (p, *parts, c.head_dim))
    k, v = ([c.bitmap, c.values, c.offsets, c.widths] for c in (there["k"], there["v"]))
    windows = (there["k_window"], there["v_window"], there["lengths"], None)
    slices = there["k"].bitmap.shape[2]
    workspace = ops.decode_attention_workspace(there["q"], there["k"].shape[1], slices, windows[0].shape[2])
    torch.library.opcheck(namespace.decode_attention, (there["q"], *k, *v, *windows, 0.1, 0, workspace))


def bad_calls(device, dtype):
    there, _ = attention_case(device, dtype)
    x = torch.zeros(1, 1, 4, 64, dtype=dtype, device=device)
    q, k, n = there["q"], there["k"], there["k_window"]
    return {
        "k: expected 1 to 64": lambda: ops.prune_compress(x, 65),
        "k: expected 1 to": lambda: ops.prune_compress(x, 0),
        "x.shape": lambda: ops.prune_compress(x[0], 3),
        "x.dtype": lambda: ops.compress(x.double()),
        "last dimension": lambda: ops.prune_compress(x.transpose(2, 3), 2),
        "head_dim": lambda: ops.compress(torch.zeros(1, 1, 1, 257, dtype=dtype, device=device)),
        "key.bitmap.shape": lambda: ops.key_scores(q[..., :64].contiguous(), k),
        "values.dtype": lambda: ops.key_scores(q.to(torch.bfloat16 if dtype != torch.bfloat16 else torch.float16), k),
        "q_heads": lambda: ops.key_scores(q[:, :3], k),
        "batch": lambda: ops.key_scores(q[:1], k),
        "tokens": lambda: torch.ops.mustafar.key_scores(q, k.bitmap, k.values, None, None, 1000),
        "both": lambda: torch.ops.mustafar.key_scores(q, k.bitmap, k.values, k.bitmap, None, 10),
        "p.shape": lambda: ops.value_output(torch.zeros(2, 8, 5, dtype=dtype, device=device), k),
        "lengths": lambda: ops.decode_attention(**(there | {"lengths": there["lengths"].long()})),
        "starts": lambda: ops.decode_attention(
            **(there | {"starts": torch.zeros(3, dtype=torch.int32, device=device)})
        ),
        "k_window.shape": lambda: ops.decode_attention(**(there | {"k_window": n[:, :1]})),
        "v_window.shape": lambda: ops.decode_attention(**(there | {"v_window": n[:, :, :5]})),
        "sliding_window": lambda: ops.decode_attention(**(there | {"sliding_window": -1})),
    }  # fmt: skip


def test_bad_arguments(target):
    """Each message names the argument."""
    for expected, call in bad_calls(*target).items():
        with pytest.raises((ValueError, TypeError), match=expected.replace(".", r"\.")):
            call()
