"""What the numbers may be: patterns of non-zeros, NaN and infinities, scores far apart, outlier channels."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from decode_steps import (
    HALF,
    LAYOUTS,
    assert_accurate,
    assert_attends,
    assert_like_dense,
    assert_multiplies,
    crowd,
    in_float32,
    on_each_device,
    on_each_target,
    packed,
    randn,
    sdpa,
    step,
)
from mustafar import num_kept, ops, reference

ROWS = (
    "one word",
    "last channel",
    "first and last",
    "all zero",
    "equal",
    "one full row",
    "full and empty",
    "a run of 32",
)


def patterned(rows: str, x: torch.Tensor) -> torch.Tensor:
    """x [B, Hkv, T, D] with zeros in a named pattern."""
    channel = torch.arange(x.shape[3], device=x.device)
    token = torch.arange(x.shape[2], device=x.device)[:, None]
    first, last, even = channel == 0, channel == x.shape[3] - 1, token % 2 == 0
    keep = {
        "one word": channel // 32 == token % max(1, x.shape[3] // 32),
        "last channel": last.expand(x.shape[2], -1),
        "first and last": first | (last & even),
        "all zero": torch.zeros_like(x[0, 0], dtype=torch.bool),
        "equal": torch.ones_like(x[0, 0], dtype=torch.bool),
        "one full row": (token % 64 == 37) | (channel == token % x.shape[3]),
        "full and empty": even.expand(-1, x.shape[3]),
        "a run of 32": (channel < token % 32) | (channel >= token % 32 + 32),
    }[rows]
    return torch.where(keep, x.sign() if rows == "equal" else x, 0)


@pytest.mark.parametrize("rows", ROWS)
@on_each_target
def test_patterns(device, dtype, rows):
    for head_dim, group in ((64, 4), (80, 8), (128, 1), (128, 4), (128, 12), (200, 3), (256, 8)):
        args = step(device, dtype, batch=1, group=group, head_dim=head_dim)
        x = [patterned(rows, randn(1, 2, 130, head_dim, device=device, dtype=dtype, seed=s)) for s in (1, 2)]
        for general in ("k", "v", "kv"):
            new = {n: reference.compress(part) for n, part in zip("kv", x, strict=True) if n in general}
            assert_attends(ops.decode_attention(**args | new), args | new, (head_dim, group, general))
        assert_multiplies(args["q"], new["k"], (head_dim, group))
        if rows == "equal":  # ties, in the layout that has to choose
            new = {n: reference.prune_compress(part, head_dim // 2) for n, part in zip("kv", x, strict=True)}
            assert_attends(ops.decode_attention(**args | new), args | new, (head_dim, group))


@pytest.mark.parametrize("rows", ROWS)
@on_each_target
def test_patterns_slice_after_slice(device, dtype, rows):
    for head_dim, group in ((64, 4), (128, 1), (128, 4), (128, 8)):
        args = step(device, dtype, batch=1, heads=1, group=group, head_dim=head_dim)
        x = [patterned(rows, randn(1, 1, 1500, head_dim, device=device, dtype=dtype, seed=s)) for s in (1, 2)]
        args |= {n: reference.compress(part) for n, part in zip("kv", x, strict=True)}
        args["lengths"] = torch.tensor([[1500, 40]], dtype=torch.int32, device=device)
        got = ops.decode_attention(**crowd(args, 300 if device == "cuda" else 2))
        assert torch.equal(got, got[:1].expand_as(got))
        assert_attends(got[:1], args, (head_dim, group))


SPECIAL = {"inf": [math.inf], "-inf": [-math.inf], "nan": [math.nan], "both": [math.inf, -math.inf]}


@pytest.mark.parametrize("place", [0, 37, 63, 64, 129, "window"], ids=str)
@pytest.mark.parametrize("part", ["k", "v"])
@on_each_target
def test_special_values_stay_in_their_head(device, dtype, part, place):
    """They reach what they reach in dense float32 attention, and not a bit of another head or sequence changes."""
    for layout, group in itertools.product(LAYOUTS, (1, 4, 8) if device == "cuda" else (4,)):
        args = step(device, dtype, tokens=200, group=group, layouts=(layout, layout))
        touched = torch.zeros(2, 2 * group, 1, dtype=torch.bool, device=device)
        touched[0, group:] = True
        for name, values in SPECIAL.items():
            plain, new = (with_values(args, part, place, row) for row in ([1.0] * len(values), values))
            got, exact, what = ops.decode_attention(**new), in_float32(new), (layout, group, name)
            assert_like_dense(got, exact, what)
            assert torch.equal(*(x[~touched[..., 0]] for x in (got, ops.decode_attention(**plain)))), what
            assert part == "k" or not exact[touched[..., 0]].isfinite().any(0).all(), what
            if place != "window":
                assert_spmv_like_dense(new, part, touched[..., 0], what)


def with_values(args: dict, part: str, place: int | str, values: list[float]) -> dict:
    """The step with `values` in channels 5, 6 ... of one token of sequence 0, KV head 1."""
    if place == "window":
        window = args[f"{part}_window"].clone()
        window[0, 1, 33, 5 : 5 + len(values)] = torch.tensor(values, dtype=window.dtype)
        return args | {f"{part}_window": window}
    dense, keep = reference.decompress(args[part]), reference.keep_mask(args[part])
    for channel, value in enumerate(values, 5):
        keep[0, 1, place, channel], dense[0, 1, place, channel] = True, value
    return args | {part: reference.pack(dense, keep, 128 if args[part].is_uniform else None)}


def assert_spmv_like_dense(args: dict, part: str, touched: torch.Tensor, what: object) -> None:
    q, c = args["q"], args[part]
    if part == "k":
        got, exact = ops.key_scores(q, c), reference.key_scores(q, c)
        error = (got.float() - exact)[exact.isfinite()].abs().max()
        assert error <= 2 * torch.finfo(q.dtype).eps * exact[exact.isfinite()].abs().max(), what
        assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf()), what
    else:
        p = randn(*q.shape[:2], c.tokens, device=q.device.type, dtype=torch.float32).softmax(-1).to(q.dtype)
        got, exact = ops.value_output(p, c), reference.value_output(p, c)
        assert_like_dense(got, exact, what)
    assert got[~touched].isfinite().all(), what


WEIGHTLESS = {
    "one key": [100], "first slice": range(64), "a slice inside": range(64, 128), "last slice": range(192, 200),
    "all but one": range(199), "all compressed": range(200), "all in the window": range(200, 240),
    "all but the window's last": range(239), "every second": range(0, 240, 2),
}  # fmt: skip


def with_minus_infinite_scores(args: dict, tokens: object) -> dict:
    """The step with keys of -inf in a channel where all queries are positive: those tokens weigh nothing."""
    q, dense, window = args["q"].clone(), reference.decompress(args["k"]), args["k_window"].clone()
    q[..., 7] = q[..., 7].abs() + 0.5
    tokens = torch.tensor(list(tokens))
    compressed = tokens[tokens < args["k"].tokens].to(q.device)
    recent = tokens[tokens >= args["k"].tokens].to(q.device) - args["k"].tokens
    keep = reference.keep_mask(args["k"])
    keep[:, :, compressed, 7], dense[:, :, compressed, 7] = True, -math.inf
    window[:, :, recent, 7] = -math.inf
    return args | {
        "q": q,
        "k": reference.pack(dense, keep, 128 if args["k"].is_uniform else None),
        "k_window": window,
    }


@pytest.mark.parametrize("tokens", WEIGHTLESS)
@on_each_target
def test_scores_of_minus_infinity(device, dtype, tokens):
    """An infinite key may give a score of -inf: weight 0, and a finite output, even if a whole slice has no other."""
    for layout, group in itertools.product(LAYOUTS, (1, 4, 8)):
        args = step(device, dtype, batch=1, tokens=200, group=group, layouts=(layout, layout))
        args = with_minus_infinite_scores(args, WEIGHTLESS[tokens])
        got = ops.decode_attention(**args)
        assert torch.isfinite(got).all()
        assert_attends(got, args, (layout, group))


@on_each_target
def test_weight_zero_times_infinity_is_nan(device, dtype):
    """A visible value of weight 0 is still multiplied, as in dense attention: 0 x NaN shows, in its channel alone."""
    args = with_minus_infinite_scores(step(device, dtype, tokens=200), [100, 210])
    dense, window = reference.decompress(args["v"]), args["v_window"].clone()
    dense[0, 0, 100, 3], dense[0, 1, 100, 9], window[1, 0, 10, 4] = math.nan, math.inf, math.nan
    args |= {"v": reference.compress(dense), "v_window": window}
    got, exact = ops.decode_attention(**args), in_float32(args)
    assert exact.isnan().sum() == 3 * 4
    assert_like_dense(got, exact)


@on_each_target
def test_all_scores_minus_infinity(device, dtype):
    """Visible tokens of weight zero and no others: 0 / 0, as dense attention has it."""
    for tokens, window in ((64, 0), (200, 40), (0, 40)):
        args = step(device, dtype, batch=1, heads=1, tokens=tokens, window=window)
        args = with_minus_infinite_scores(args, range(tokens + window))
        assert ops.decode_attention(**args).isnan().all(), (tokens, window)


def one_channel(
    scores: torch.Tensor, dtype: torch.dtype, layout: str, group: int = 4, window: int = 40
) -> dict:
    """A step whose scores [T + window] are exact: keys of one channel, queries of 1."""
    args = step(
        str(scores.device),
        dtype,
        batch=1,
        heads=1,
        tokens=scores.numel() - window,
        window=window,
        group=group,
    )
    keys = torch.zeros(1, 1, scores.numel(), 128, device=scores.device, dtype=dtype)
    keys[0, 0, :, 77] = scores
    k = keys[:, :, :-window].contiguous()
    k = reference.prune_compress(k, 8) if layout == "uniform" else reference.compress(k)
    return args | {"q": torch.ones_like(args["q"]), "k": k, "k_window": keys[:, :, -window:], "scale": 1.0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rise", [0.25, 4.0, 5.5, 7.75, 8.5, 30.0, 300.0])
@on_each_target
def test_running_maximum(device, dtype, rise, layout):
    """Scores that rise, or fall, from slice to slice by little or much; tiny ones, then a huge one."""
    slices = torch.arange(21 * 64 + 40, device=device) // 64 - 10
    for direction in (1, -1):
        ramp = direction * rise * slices
        args = one_channel(ramp, dtype, layout)
        for sequences in (1, 300 if device == "cuda" else 2):  # a slice a warp, several
            got = ops.decode_attention(**crowd(args, sequences))
            assert_attends(got[:1], args, (direction, sequences))
        inside = direction * rise * (torch.arange(slices.numel(), device=device) % 64 - 32)
        args = one_channel(inside, dtype, layout)
        assert_attends(ops.decode_attention(**args), args, ("inside a slice", direction))


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_target
def test_one_huge_score(device, dtype, layout):
    for place in (0, 64, 700, 1343, 1344, 1383) if device == "cuda" else (64, 1343, 1383):
        for low, high in ((-1e-3, 60.0), (-1e4, 1e4), (-6e4, 6e4), (0.0, 3e4), (-6e4, -5e4)):
            scores = torch.full((1384,), low, device=device)
            scores[place] = high
            args = one_channel(scores, dtype, layout)
            assert_attends(ops.decode_attention(**args), args, (place, low, high))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@on_each_target
def test_scores_beyond_half_precision(device, dtype, head_dim):
    """q . k that overflows float16 before it is scaled, of which one stands out."""
    args = step(device, dtype, batch=1, tokens=300, head_dim=head_dim, window=1)
    dense = reference.decompress(args["k"])
    dense[:, :, 170] = 64 * args["q"].view(1, 2, 4, head_dim).mean(2)
    args |= {"k": packed(dense, "uniform", 24), "q": 2000 * args["q"]}
    got = ops.decode_attention(**args)
    assert torch.isfinite(got).all()
    assert_accurate(got, sdpa(args), in_float32(args))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 1e-3])
@on_each_target
def test_scale(device, dtype, scale):
    args = step(device, dtype, tokens=300, scale=scale)
    assert_attends(ops.decode_attention(**args), args)


@pytest.mark.parametrize("q_scale", [1.0, 8.0])
@pytest.mark.parametrize("data", ["normal", "outliers"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@on_each_target
def test_accuracy(device, dtype, head_dim, data, q_scale):
    """Against SDPA on the same pruned inputs, without and with the outlier channels of real keys."""
    for sparsity, layout in itertools.product((0.5, 0.7), LAYOUTS):
        kept = num_kept(sparsity, head_dim)
        args = step(
            device, dtype, tokens=1000 if device == "cuda" else 400, heads=1, head_dim=head_dim, kept=(kept, kept),
            layouts=(layout, layout), q_scale=q_scale,
        )  # fmt: skip
        if data == "outliers":
            scaled = torch.ones(head_dim, device=device, dtype=dtype)
            scaled[[3, head_dim // 3, head_dim // 2 + 1, head_dim - 5]] = 20
            dense = reference.decompress(args["k"]) * scaled
            args |= {"k": packed(dense, layout, kept), "k_window": args["k_window"] * scaled}
        assert_attends(ops.decode_attention(**args), args, (sparsity, layout))
        assert_multiplies(args["q"], args["k"], (sparsity, layout))


@on_each_device
def test_smallest_and_largest_values(device):
    """Values at both ends of the format pass through a softmax of one token unchanged."""
    for dtype in HALF:
        info = torch.finfo(dtype)
        # A quarter of bfloat16's smallest normal number would be subnormal in float32 too.
        small = info.smallest_normal / 4 if dtype == torch.float16 else info.smallest_normal
        ends = torch.tensor([info.max, -info.max, small, -small, 1.0])
        args = step(device, dtype, tokens=70, window=0, lengths=[[1, 0], [70, 0]], starts=[0, 69])
        values = ends.repeat(26)[:128].to(device, dtype).expand(2, 2, 70, 128)
        args["v"] = reference.compress(values)
        expected = values[:, :1, 0].expand(2, 8, 128)
        assert torch.equal(ops.decode_attention(**args), expected)


def test_the_tests_notice():
    """A wrong oracle fails: what the assertions let pass must not be everything."""
    args = step("cpu", torch.float16, tokens=300, scale=0.1)
    wrong = dataclasses.replace(args["k"], bitmap=args["k"].bitmap.roll(1, dims=3))
    with pytest.raises(AssertionError):
        assert_attends(ops.decode_attention(**args | {"k": wrong}), args)
    with pytest.raises(AssertionError):
        assert_attends(ops.decode_attention(**args | {"scale": 0.1005}), args)
