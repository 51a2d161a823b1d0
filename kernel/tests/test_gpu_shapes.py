"""Every head dim, group, layout, width and length: the ops are as accurate as PyTorch in the same dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from decode_steps import (
    LAYOUTS,
    assert_attends,
    assert_multiplies,
    crowd,
    on_each_device,
    on_each_target,
    sequences,
    step,
)
from mustafar import ops

HEAD_DIMS = (8, 64, 72, 80, 96, 112, 120, 128, 160, 192, 200, 256)
GROUPS = (*range(1, 10), 12, 16, 32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@on_each_target
def test_head_dims_groups_and_layouts(device, dtype, head_dim):
    kept = (-(-head_dim * 3 // 10), head_dim // 2)
    for layouts in itertools.product(LAYOUTS, LAYOUTS):
        for group in GROUPS if device == "cuda" else GROUPS[1::3]:
            args = step(device, dtype, batch=1, group=group, head_dim=head_dim, kept=kept, layouts=layouts)
            assert_attends(ops.decode_attention(**args), args, (layouts, group))
            if layouts[0] == layouts[1]:
                assert_multiplies(args["q"], args["k"], (layouts, group))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 200, 256])
@on_each_target
def test_widths(device, dtype, head_dim):
    """From 8 slots to all channels, keys and values of different widths, and rows that leave slots unused."""
    for width in range(8, head_dim + 1, 8):
        kept = (width - width // 8 % 8, head_dim + 8 - width)
        for layouts in (("uniform", "uniform"), ("general", "uniform"), ("uniform", "general")):
            args = step(
                device, dtype, batch=1, heads=1, head_dim=head_dim, kept=kept, layouts=layouts, window=7
            )
            assert_attends(ops.decode_attention(**args), args, (kept, layouts))
        assert_multiplies(args["q"], args["k"], kept)
        assert_multiplies(args["q"], args["v"], kept)


@pytest.mark.parametrize("kept", [(1, 1), (1, 128), (128, 1), (128, 128), (13, 90)], ids=str)
@on_each_target
def test_sparsity_of_keys_and_values_may_differ(device, dtype, kept):
    for layouts in itertools.product(LAYOUTS, LAYOUTS):
        args = step(device, dtype, tokens=333, kept=kept, layouts=layouts)
        assert_attends(ops.decode_attention(**args), args, layouts)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_target
def test_lengths(device, dtype, layout):
    """Around the slices' and the window's edges; one token; no slice, no window."""
    for tokens, window in itertools.product((0, 1, 2, 63, 64, 65, 127, 128, 129, 500), (0, 1, 32, 33, 288)):
        if tokens + window:
            args = step(device, dtype, heads=1, tokens=tokens, window=window, layouts=(layout, layout))
            assert_attends(ops.decode_attention(**args), args, (tokens, window))


@pytest.mark.parametrize(
    "case", ["one long", "one long, general", "one long of 8 heads", "uneven", "many short"]
)
@on_each_device
def test_splits(device, case):
    """Problems that must be cut into many parts, that must not, and that fill hardly any of their parts."""
    long = (1 << 17) + 17 if device == "cuda" else 5000
    shapes = {
        "one long": {"batch": 1, "heads": 1, "tokens": long, "window": 33},
        "one long, general": {"batch": 1, "heads": 1, "tokens": long // 4, "layouts": ("general", "general")},
        "one long of 8 heads": {"batch": 1, "heads": 8, "group": 8, "tokens": long // 8, "head_dim": 64},
        "uneven": {"batch": 5, "heads": 1, "tokens": long // 8,
                   "lengths": [[long // 8, 0], [1, 1], [0, 0], [64, 40], [0, 40]]},
        "many short": {"batch": 300 if device == "cuda" else 30, "tokens": 65, "window": 1},
    }  # fmt: skip
    args = step(device, torch.float16, **shapes[case])
    assert_attends(ops.decode_attention(**args), args)
    if case.startswith("one"):
        assert_multiplies(args["q"], args["k"])


@pytest.mark.parametrize("layout", LAYOUTS)
@on_each_target
def test_slice_after_slice(device, dtype, layout):
    """A few sequences are cut into a piece a warp; of many a warp takes several slices, and window chunks before."""
    for head_dim, group in ((64, 4), (128, 1), (128, 2), (128, 4), (128, 6), (128, 8), (256, 4)):
        args = step(
            device, dtype, batch=1, heads=1, tokens=2700, window=130, group=group, head_dim=head_dim,
            layouts=(layout, layout), lengths=[[2650, 77]], starts=[70],
        )  # fmt: skip
        got = ops.decode_attention(**crowd(args, 300 if device == "cuda" else 2))
        assert torch.equal(got, got[:1].expand_as(got))
        assert_attends(got[:1], args, (head_dim, group))


@on_each_target
def test_hardly_filled_capacity(device, dtype):
    """Storage for 20,000 tokens of which three are in use."""
    args = step(device, dtype, heads=1, tokens=20_000 if device == "cuda" else 2000, lengths=[[2, 1], [0, 3]])
    assert_attends(ops.decode_attention(**args), args)


@on_each_device
def test_largest_batch(device):
    """As many sequences as a CUDA grid holds: the first and the last come out as they do alone."""
    batch = 65535 if device == "cuda" else 3000
    args = step(device, torch.float16, batch=batch, heads=1, group=1, tokens=3, head_dim=8, window=1)
    out, scores = ops.decode_attention(**args), ops.key_scores(args["q"], args["k"])
    for part in (slice(0, 3), slice(batch - 3, batch)):
        alone = {n: sequences(x, part) for n, x in args.items()}
        assert_attends(out[part], alone)
        assert torch.equal(scores[part], ops.key_scores(alone["q"], alone["k"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_larger_batches_are_refused():
    args = step("cuda", torch.float16, batch=65536, heads=1, group=1, tokens=3, head_dim=8, window=1)
    with pytest.raises(ValueError, match="decode_attention: at most 65535 sequences"):
        ops.decode_attention(**args)
    with pytest.raises(ValueError, match="key_scores: at most 65535 sequences"):
        ops.key_scores(args["q"], args["k"])
    with pytest.raises(ValueError, match="value_output: at most 65535 sequences"):
        ops.value_output(torch.ones(65536, 1, 3, device="cuda", dtype=torch.float16), args["v"])
