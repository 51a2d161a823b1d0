"""What only a GPU can show: graphs, streams, determinism, stores beyond 2^31 values, alignment, devices.

The results themselves: test_gpu_shapes.py, test_gpu_visibility.py, test_gpu_numerics.py beside this file (on the CPU
too) and kernel_wrapper/tests/test_ops.py.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from decode_steps import GPU_MARKS, HALF, assert_accurate, assert_attends, randn, step
from mustafar import ops, reference
from mustafar.format import CompressedTensor, slices_for, width_for, words_for

pytestmark = list(GPU_MARKS)

SHAPES = {
    "many splits": {"batch": 1, "heads": 1, "tokens": 20_000, "window": 33},
    "one split": {"batch": 4, "heads": 8, "tokens": 130, "window": 1},
    "general": {"batch": 2, "tokens": 3000, "layouts": ("general", "general")},
    "group of 12": {"batch": 2, "tokens": 3000, "group": 12, "head_dim": 80},
    "head_dim 256": {"batch": 2, "tokens": 3000, "head_dim": 256},
}  # fmt: skip


def gpu_step(dtype=torch.float16, **shape) -> dict:
    return step("cuda", dtype, **shape)


def weights(args: dict) -> torch.Tensor:
    """Input of value_output for a step's values."""
    p = randn(*args["q"].shape[:2], args["v"].tokens, device="cuda", dtype=torch.float32, seed=7)
    return p.softmax(-1).to(args["q"].dtype)


def every_op(args: dict, p: torch.Tensor) -> list[torch.Tensor]:
    return [
        ops.decode_attention(**args),
        ops.key_scores(args["q"], args["k"]),
        ops.value_output(p, args["v"]),
    ]


def all_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Determinism


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_on_every_run(shape, dtype):
    args = gpu_step(dtype, **SHAPES[shape])
    p = weights(args)
    first = every_op(args, p)
    assert all(all_equal(every_op(args, p), first) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_whatever_else_runs(shape):
    """Alone, beside other work on another stream, and beside itself."""
    args, other = gpu_step(**SHAPES[shape]), gpu_step(tokens=500, batch=3)
    p, other_p = weights(args), weights(other)
    alone, other_alone = every_op(args, p), every_op(other, other_p)
    busy = torch.randn(2048, 2048, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    got, other_got = [], []
    for _ in range(10):
        with torch.cuda.stream(streams[0]):
            got.append(every_op(args, p))
        with torch.cuda.stream(streams[1]):
            other_got.append(every_op(other, other_p))
            got.append(every_op(args, p))
        with torch.cuda.stream(streams[2]):
            busy = (busy @ busy).clamp(-1, 1)
    torch.cuda.synchronize()
    assert all(all_equal(each, alone) for each in got)
    assert all(all_equal(each, other_alone) for each in other_got)


# Workspace and CUDA graphs


def workspace_for(args: dict) -> torch.Tensor:
    slices = max(args[name].bitmap.shape[2] for name in "kv")
    return ops.decode_attention_workspace(args["q"], args["k"].shape[1], slices, args["k_window"].shape[2])


def capture(work) -> tuple[torch.cuda.CUDAGraph, object]:
    """Run once, then capture under the detector of synchronisation."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            result = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, result


def copy_step(target: dict, source: dict) -> None:
    """All tensors of one step into those of another of the same shapes, in place."""
    for name, part in source.items():
        if isinstance(part, CompressedTensor):
            for field in ("bitmap", "values", *(() if part.is_uniform else ("offsets", "widths"))):
                mine, new = getattr(target[name], field), getattr(part, field)
                mine[: new.shape[0]].copy_(new) if mine.dim() == 1 else mine.copy_(new)
        elif isinstance(part, torch.Tensor):
            target[name].copy_(part)


@pytest.mark.parametrize("shape", SHAPES)
def test_graph_follows_its_inputs(shape):
    """Queries, packed keys and values, window, lengths and padding change in place between replays."""
    args = gpu_step(**SHAPES[shape])
    args["starts"] = torch.zeros(args["q"].shape[0], dtype=torch.int32, device="cuda")
    for name in "kv":  # room for any other content of the general layout
        if not args[name].is_uniform:
            room = args[name].values.new_zeros(args[name].offsets.numel() * 64 * args[name].head_dim)
            room[: args[name].values.numel()] = args[name].values
            args[name] = dataclasses.replace(args[name], values=room)
    p, workspace = weights(args), workspace_for(args)
    graph, outs = capture(lambda: every_op(args | {"workspace": workspace}, p))
    tokens, window = args["lengths"][0].tolist()
    queries = args["q"].clone()
    for seed, (lengths, start) in enumerate(
        [
            ([tokens, window], 0),
            ([100, 1], 70),
            ([0, 1], 0),
            ([0, 0], 0),
            ([65, 0], 64),
            ([tokens, 0], tokens // 2),
        ]
    ):
        shift = seed % 3
        fresh = {n: x.roll(shift, 0) if n in ("k_window", "v_window") else x for n, x in args.items()}
        fresh["q"] = queries.roll(shift, 1) * (1 + shift)
        for name in "kv":
            c = args[name]
            fresh[name] = dataclasses.replace(c, values=c.values * (-1 if seed % 2 else 0.5))
        fresh["lengths"] = torch.tensor(lengths, dtype=torch.int32, device="cuda").expand_as(args["lengths"])
        fresh["starts"] = torch.full_like(args["starts"], start)
        copy_step(args, fresh)
        workspace.fill_(0xFF)  # NaN: nothing of the last replay may be needed
        graph.replay()
        assert all_equal(outs, every_op(args, p)), (lengths, start)
        if sum(lengths):
            assert_attends(outs[0], args, (lengths, start))
        else:
            assert not outs[0].any()


def test_layers_share_a_workspace_in_a_graph():
    layers = [gpu_step(batch=1, heads=1, tokens=n, window=33) for n in (6400, 64, 20_000, 700)]
    workspace = max((workspace_for(args) for args in layers), key=torch.Tensor.numel)
    expected = [ops.decode_attention(**args) for args in layers]
    graph, outs = capture(lambda: [ops.decode_attention(**args, workspace=workspace) for args in layers])
    for _ in range(3):
        graph.replay()
        assert all_equal(outs, expected)


def test_only_the_output_is_allocated():
    """With a workspace, in a capture and outside."""
    args = gpu_step(batch=1, heads=1, tokens=20_000)
    args["workspace"] = workspace_for(args)

    def allocations() -> int:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        out = ops.decode_attention(**args)
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before - (out.numel() > 0)

    assert allocations() == 0
    _, extra = capture(allocations)
    assert extra == 0


def test_capture_without_a_workspace_is_refused():
    """Memory of the graph's own pool that nobody sees would stay with every graph."""
    args = gpu_step(batch=1, heads=1, tokens=20_000)
    if not workspace_for(args).numel():
        pytest.skip("decode_attention needs no workspace for this shape")
    expected = ops.decode_attention(**args)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        out = torch.zeros(1, device="cuda") + 1  # an empty graph would be a warning
        with pytest.raises(RuntimeError, match="workspace"):
            ops.decode_attention(**args)
    assert out is not None
    assert torch.equal(ops.decode_attention(**args), expected)


def test_a_workspace_too_small_is_refused():
    args = gpu_step(batch=1, heads=1, tokens=20_000)
    workspace = workspace_for(args)
    if not workspace.numel():
        pytest.skip("decode_attention needs no workspace for this shape")
    with pytest.raises(ValueError, match="workspace"):
        ops.decode_attention(**args, workspace=workspace[: workspace.numel() // 2])
    with pytest.raises(ValueError, match="workspace"):
        ops.decode_attention(**args, workspace=workspace.cpu())


def test_workspace_is_not_written_past_its_end():
    for shape in SHAPES.values():
        args = gpu_step(**shape)
        size = workspace_for(args).numel()
        room = torch.full((size + 4096,), 0x5A, dtype=torch.uint8, device="cuda")
        expected = ops.decode_attention(**args)
        assert torch.equal(ops.decode_attention(**args, workspace=room[:size]), expected)
        assert bool((room[size:] == 0x5A).all())


def test_no_synchronisation():
    args = gpu_step(tokens=3000)
    p = weights(args)
    every_op(args, p)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(args, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Addresses


@pytest.fixture
def gpu_memory():
    """Skips where less than the gigabytes asked for are free; gives back afterwards what the test took."""

    def need(gigabytes: int) -> None:
        if torch.cuda.mem_get_info()[0] < gigabytes << 30:
            pytest.skip(f"needs {gigabytes} GB of free GPU memory")

    yield need
    gc.collect()
    torch.cuda.empty_cache()


def test_more_than_2_to_31_values(gpu_memory):
    """One store of 2^31 + values and every head of it in use; the first and the last head are checked."""
    gpu_memory(30)
    batch, heads, head_dim, width = 2, 4, 128, 64
    slices = (1 << 31) // (batch * heads * 64 * width) + 1
    tokens = 64 * slices - 5
    values = torch.empty(batch, heads, slices, width // 8, 64, 8, dtype=torch.float16, device="cuda")
    assert values.numel() > 1 << 31
    values.normal_(generator=torch.Generator("cuda").manual_seed(0))
    # Channels 0, 2, 4 ... of even tokens and 1, 3, 5 ... of odd ones.
    bitmap = torch.empty(batch, heads, slices, 64, 2, dtype=torch.int64, device="cuda")
    bitmap[..., ::2, :], bitmap[..., 1::2, :] = 0x5555555555555555, -0x5555555555555556
    bitmap[:, :, -1, 59:], values[:, :, -1, :, 59:] = 0, 0
    c = CompressedTensor(bitmap, values, None, None, tokens, head_dim)
    q = 4 * randn(
        batch, heads, head_dim, device="cuda", dtype=torch.float16
    )  # a few tokens get most of the weight
    window = randn(batch, heads, 8, head_dim, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([[tokens, 8]] * batch, dtype=torch.int32, device="cuda")
    got = ops.decode_attention(q, c, c, window, window, lengths)
    scores = ops.key_scores(q, c)
    p = torch.zeros(batch, heads, tokens, dtype=torch.float16, device="cuda")
    places = torch.tensor([0, 1, 63, tokens // 2, tokens - 70, tokens - 1], device="cuda")
    p[..., places] = torch.arange(1, 7, device="cuda").half() / 16
    weighed = ops.value_output(p, c)
    for b, h in ((0, 0), (1, 3)):
        dense = values.new_zeros(slices, 64, width, 2)
        rows = values[b, h].transpose(1, 2).flatten(2)
        dense[:, ::2, :, 0], dense[:, 1::2, :, 1] = rows[:, ::2], rows[:, 1::2]
        dense = dense.view(-1, head_dim)[:tokens]
        exact = dense.float() @ q[b, h].float()
        error = (scores[b, h].float() - exact).abs().max()
        assert error <= 2 * torch.finfo(q.dtype).eps * exact.abs().max()
        expected = p[b, h, places].float() @ dense[places].float()
        assert (weighed[b, h].float() - expected).abs().max() <= 4e-3
        all_scores = torch.cat([exact, window[b, h].float() @ q[b, h].float()]) * head_dim**-0.5
        weight = all_scores.softmax(-1)
        expected = weight[:-8] @ dense.float() + weight[-8:] @ window[b, h].float()
        joined = torch.cat([dense, window[b, h]])[None, None]
        peer = torch.nn.functional.scaled_dot_product_attention(q[b, h][None, None, None], joined, joined)
        assert_accurate(got[b, h], peer[0, 0, 0], expected, (b, h))


def test_strides_beyond_32_bits(gpu_memory):
    """The second sequence lies more than 2^31 values behind the first."""
    gpu_memory(16)
    args = gpu_step(heads=1)
    far = (1 << 31) + 1024
    for name in "kv":
        c = args[name]
        store = torch.empty(far + c.values[0].numel(), dtype=c.dtype, device="cuda")
        values = store.as_strided(c.values.shape, (far, *c.values.stride()[1:])).copy_(c.values)
        args[name] = dataclasses.replace(c, values=values)
    near = {n: dataclasses.replace(args[n], values=args[n].values.contiguous()) for n in "kv"}
    assert all_equal(every_op(args, weights(args)), every_op(args | near, weights(args)))
    assert_attends(ops.decode_attention(**args), args)


def test_general_offsets_beyond_32_bits(gpu_memory):
    gpu_memory(16)
    args = gpu_step(heads=1, layouts=("general", "general"))
    p = weights(args)
    expected, far = every_op(args, p), (1 << 31) + 1024
    for name in "kv":
        c = args[name]
        store = torch.empty(far + c.values.numel(), dtype=c.dtype, device="cuda")
        store[far:] = c.values
        args[name] = dataclasses.replace(c, values=store, offsets=c.offsets + far)
    assert all_equal(every_op(args, p), expected)


def test_slices_of_the_general_layout_lie_in_any_order():
    args = gpu_step(tokens=700, layouts=("general", "general"))
    p = weights(args)
    expected = every_op(args, p)
    for name in "kv":
        c = args[name]
        pieces, at = [], 0
        offsets = torch.empty_like(c.offsets)
        for index in reversed(torch.cartesian_prod(*map(torch.arange, c.widths.shape)).tolist()):
            start, size = int(c.offsets[tuple(index)]), 64 * int(c.widths[tuple(index)])
            pieces += [c.values[start : start + size], c.values.new_full((8,), torch.nan)]  # gaps
            offsets[tuple(index)] = at
            at += size + 8
        args[name] = dataclasses.replace(c, values=torch.cat(pieces), offsets=offsets)
    assert all_equal(every_op(args, p), expected)


def test_strided_windows_and_queries():
    args = gpu_step()
    expected = ops.decode_attention(**args)
    for name in ("k_window", "v_window"):  # heads inside tokens, as projections leave them
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, 8, 256, dtype=torch.float16, device="cuda")
    wide[..., :128] = args["q"]
    args["q"] = wide[..., :128]
    assert torch.equal(ops.decode_attention(**args), expected)
    assert torch.equal(
        ops.key_scores(args["q"], args["k"]), ops.key_scores(args["q"].contiguous(), args["k"])
    )
    args["k_window"] = torch.zeros(2, 2, 40, 130, dtype=torch.float16, device="cuda")[..., 1:129]
    with pytest.raises(ValueError, match="k_window"):
        ops.decode_attention(**args)


def test_filled_part_of_a_store():
    """Views of stores with room for more slices and more window tokens than are passed."""
    args = gpu_step(tokens=640, window=96)
    part = dict(args)
    for name in "kv":
        c = args[name]
        part[name] = dataclasses.replace(c, bitmap=c.bitmap[:, :, :3], values=c.values[:, :, :3], tokens=192)
        part[f"{name}_window"] = args[f"{name}_window"][:, :, :17]
    part["lengths"] = torch.tensor([[192, 17], [130, 5]], dtype=torch.int32, device="cuda")
    assert_attends(ops.decode_attention(**part), part)


def test_head_dim_not_a_multiple_of_8_is_refused():
    x = randn(1, 1, 70, 100, device="cuda", dtype=torch.float16)
    with pytest.raises((RuntimeError, ValueError)):
        ops.key_scores(x[:, :, 0].contiguous(), reference.prune_compress(x, 50))


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """Whichever device is current, with a graph and a workspace of its own."""
    args = gpu_step(tokens=6400)
    there = {name: part.to("cuda:1") for name, part in args.items()}
    p = weights(args)
    expected = every_op(args, p)
    assert all_equal([x.cpu() for x in every_op(there, p.to("cuda:1"))], [x.cpu() for x in expected])
    with torch.cuda.device(1):
        there["workspace"] = ops.decode_attention_workspace(there["q"], 2, slices_for(6400), 40)
        graph, out = capture(lambda: ops.decode_attention(**there))
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out.cpu(), expected[0].cpu())
    with pytest.raises(ValueError, match="device"):
        ops.decode_attention(**args | {"k": there["k"]})


def test_formula_of_bytes():
    """The uniform layout's bytes a token, which the speed-up rests on."""
    x = randn(1, 1, 64, 128, device="cuda", dtype=torch.float16)
    c = reference.prune_compress(x, 39)
    assert c.nbytes == 64 * (8 * words_for(128) + 2 * width_for(39)) == 0.375 * c.dense_nbytes
