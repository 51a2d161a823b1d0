"""What only a GPU can show: every head dim, group and width, graphs, streams, huge strides, error codes.

The ops are compared with the float32 reference on smaller sets by kernel_wrapper/tests/test_ops.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

from mustafar import num_kept, ops, reference  # noqa: E402
from mustafar.format import CompressedTensor, slices_for, width_for, words_for  # noqa: E402
from mustafar.testing import accuracy  # noqa: E402

CUDA_SOURCES = Path(__file__).parents[1] / "csrc"
HALF = [torch.float16, torch.bfloat16]


def assert_as_accurate(got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    result = accuracy(got, same_dtype, exact)
    assert result.ok, str(result)


def random_rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=g, device="cuda").to(dtype)


def pruned(x: torch.Tensor, sparsity: float, layout: str = "uniform") -> CompressedTensor:
    c = reference.prune_compress(x, num_kept(sparsity, x.shape[-1]))
    return c if layout == "uniform" else reference.compress(reference.decompress(c))


def peer_attention(q, k, v, k_window, v_window, lengths, **_) -> torch.Tensor:
    """The same step in q's dtype with PyTorch on dense tensors; all sequences of equal length, nothing masked."""
    group = q.shape[1] // k.shape[1]
    packed, recent = lengths[0].tolist()
    keys = torch.cat([reference.decompress(k)[:, :, :packed], k_window[:, :, :recent]], 2)
    values = torch.cat([reference.decompress(v)[:, :, :packed], v_window[:, :, :recent]], 2)
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhtd->bht", q, keys) * q.shape[-1] ** -0.5
    return torch.einsum("bht,bhtd->bhd", scores.float().softmax(-1).to(q.dtype), values)


def step(
    dtype, *, batch=2, heads=2, group=4, tokens=200, head_dim=128, window=40, k=0.7, v=0.7, layout="uniform"
):
    """Arguments of one decode step."""
    dense = [random_rows(batch, heads, tokens, head_dim, dtype=dtype, seed=s) for s in (0, 1)]
    windows = [random_rows(batch, heads, window, head_dim, dtype=dtype, seed=s) for s in (2, 3)]
    return {
        "q": random_rows(batch, heads * group, head_dim, dtype=dtype, seed=4),
        "k": pruned(dense[0], k, layout),
        "v": pruned(dense[1], v, layout),
        "k_window": windows[0],
        "v_window": windows[1],
        "lengths": torch.tensor([[tokens, window]] * batch, dtype=torch.int32, device="cuda"),
    }


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_head_dims_and_groups(head_dim, group, dtype):
    args = step(dtype, head_dim=head_dim, group=group, batch=1)
    exact = reference.decode_attention(**args)
    assert_as_accurate(ops.decode_attention(**args), peer_attention(**args), exact)
    q, c = args["q"], args["k"]
    dense = reference.decompress(c).repeat_interleave(group, 1)
    peer = torch.einsum("bhd,bhtd->bht", q, dense)
    assert_as_accurate(ops.key_scores(q, c), peer, reference.key_scores(q, c))
    p = torch.randn(*q.shape[:2], c.tokens, device="cuda").softmax(-1).to(dtype)
    peer = torch.einsum("bht,bhtd->bhd", p, dense)
    assert_as_accurate(ops.value_output(p, c), peer, reference.value_output(p, c))


@pytest.mark.parametrize("layout", ["uniform", "general"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_widths(sparsity, layout):
    """From full rows to rows with runs of more than 32 zeros, K and V of different widths."""
    for k, v in ((sparsity, sparsity), (sparsity, 0.5), (0.7, sparsity)):
        args = step(torch.float16, k=k, v=v, layout=layout, tokens=333)
        exact = reference.decode_attention(**args)
        assert_as_accurate(ops.decode_attention(**args), peer_attention(**args), exact)


@pytest.mark.parametrize("tokens,window", [(8000, 288), (64, 0), (63, 1), (0, 288), (1, 1), (20000, 33)])
def test_lengths(tokens, window):
    args = step(torch.bfloat16, tokens=tokens, window=window, heads=1, batch=3)
    exact = reference.decode_attention(**args)
    got = ops.decode_attention(**args)
    assert_as_accurate(got, peer_attention(**args), exact)
    for _ in range(3):
        assert torch.equal(got, ops.decode_attention(**args))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("part", ["k", "v"])
def test_special_values(part, value):
    """They reach exactly the outputs that they reach in dense attention."""
    args = step(torch.float16, tokens=130, heads=1)
    dense = reference.decompress(args[part]).clone()
    dense[0, 0, 77, 5] = value
    args[part] = pruned(dense, 0.7)
    got, exact = ops.decode_attention(**args), reference.decode_attention(**args)
    assert torch.equal(got.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.allclose(got[finite].float(), exact[finite], atol=5e-3, rtol=0)
    if part == "k":
        got, exact = ops.key_scores(args["q"], args["k"]), reference.key_scores(args["q"], args["k"])
    else:
        p = torch.randn(2, args["q"].shape[1], 130, device="cuda").softmax(-1).half()
        got, exact = ops.value_output(p, args["v"]), reference.value_output(p, args["v"])
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())


def test_all_scores_minus_infinity():
    """Visible tokens of weight zero: 0 / 0, as dense attention has it."""
    args = step(torch.float16, tokens=64, window=0, batch=1, heads=1, group=1, head_dim=64)
    args["q"].fill_(1)
    dense = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.float16)
    dense[..., 3] = -math.inf
    args["k"] = reference.compress(dense)
    assert ops.decode_attention(**args).isnan().all()


def test_capacity_beyond_lengths():
    """A static cache: storage for many more slices than are filled, and garbage in the rest."""
    args = step(torch.float16, tokens=6400, window=288)
    lengths = torch.tensor([[130, 17], [64, 288]], dtype=torch.int32, device="cuda")
    for name, tokens, window in (("k", 130, "k_window"), ("v", 130, "v_window")):
        args[name].values[:, :, slices_for(tokens) :] = math.nan
        args[name].values[0, :, 2, :, 2:] = math.nan  # rows past token 129 of sequence 0
        args[name].values[1, :, 1:] = math.nan
        args[window][0, :, 17:] = math.nan
    args["lengths"] = lengths
    got = ops.decode_attention(**args)
    assert torch.isfinite(got).all()
    exact = torch.cat(
        [
            reference.decode_attention(
                **{
                    n: first(a, b, *lengths[b].tolist()) if n != "lengths" else a[b : b + 1]
                    for n, a in args.items()
                }
            )
            for b in range(2)
        ]
    )
    assert torch.allclose(got.float(), exact, atol=3e-3, rtol=0)


def first(part, b: int, tokens: int, window: int):
    """Sequence `b` alone, its compressed part cut to `tokens`, NaN in unread rows replaced."""
    if isinstance(part, CompressedTensor):
        s = slices_for(tokens)
        values = part.values[b : b + 1, :, :s].nan_to_num(nan=0.0)
        return CompressedTensor(part.bitmap[b : b + 1, :, :s], values, None, None, tokens, part.head_dim)
    return part[b : b + 1, :, :window] if part.dim() == 4 else part[b : b + 1]


@pytest.mark.parametrize("tokens", [200, 6400])
def test_graph_follows_lengths_and_does_not_synchronise(tokens):
    args = step(torch.float16, tokens=tokens, window=64)
    workspace = ops.decode_attention_workspace(args["q"], 2, slices_for(tokens), 64)
    ops.decode_attention(**args, workspace=workspace)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.decode_attention(**args, workspace=workspace)
            scores = ops.key_scores(args["q"], args["k"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lengths in ([[tokens, 64], [100, 1]], [[0, 5], [65, 0]], [[0, 0], [tokens, 64]]):
        args["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        workspace.fill_(0xFF)  # NaN
        graph.replay()
        assert torch.equal(out, ops.decode_attention(**args))
        assert torch.allclose(out.float(), reference.decode_attention(**args), atol=3e-3, rtol=0)
    assert torch.equal(scores, ops.key_scores(args["q"], args["k"]))


def test_streams():
    args = step(torch.float16, tokens=6400, batch=4)
    expected = ops.decode_attention(**args)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for stream in streams:
        with torch.cuda.stream(stream):
            outs.append([ops.decode_attention(**args) for _ in range(5)])
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for some in outs for out in some)


def test_strides_beyond_32_bits():
    """The second sequence lies more than 2^31 values behind the first."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    args = step(torch.float16, tokens=130, heads=1)
    far = (1 << 31) + 1024
    for name in ("k", "v"):
        c = args[name]
        shape, strides = c.values.shape, c.values.stride()
        store = torch.empty(far + c.values[0].numel(), dtype=c.dtype, device="cuda")
        values = store.as_strided(shape, (far, *strides[1:])).copy_(c.values)
        args[name] = CompressedTensor(c.bitmap, values, None, None, c.tokens, c.head_dim)
    exact = reference.decode_attention(**args)
    assert_as_accurate(ops.decode_attention(**args), peer_attention(**args), exact)
    got = ops.key_scores(args["q"], args["k"])
    assert torch.allclose(got.float(), reference.key_scores(args["q"], args["k"]), atol=0.05, rtol=1e-3)


def test_general_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    args = step(torch.float16, tokens=130, heads=1, layout="general")
    far = (1 << 31) + 1024
    for name in ("k", "v"):
        c = args[name]
        store = torch.empty(far + c.values.numel(), dtype=c.dtype, device="cuda")
        store[far:] = c.values
        args[name] = CompressedTensor(c.bitmap, store, c.offsets + far, c.widths, c.tokens, c.head_dim)
    exact = reference.decode_attention(**args)
    assert_as_accurate(ops.decode_attention(**args), peer_attention(**args), exact)


def test_strided_windows_and_queries():
    args = step(torch.float16, tokens=130)
    expected = ops.decode_attention(**args)
    for name in ("k_window", "v_window"):  # heads inside tokens, as projections leave them
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, 8, 256, dtype=torch.float16, device="cuda")
    wide[..., :128] = args["q"]
    args["q"] = wide[..., :128]
    assert torch.equal(ops.decode_attention(**args), expected)
    args["k_window"] = torch.zeros(2, 2, 40, 130, dtype=torch.float16, device="cuda")[..., 1:129]
    with pytest.raises(ValueError, match="k_window"):
        ops.decode_attention(**args)


def test_head_dim_not_a_multiple_of_8_is_refused():
    x = random_rows(1, 1, 70, 100, dtype=torch.float16)
    with pytest.raises((RuntimeError, ValueError)):
        ops.key_scores(x[:, :, 0].contiguous(), pruned(x, 0.5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    args = step(torch.float16, tokens=6400)
    expected = ops.decode_attention(**args)
    there = {name: part.to("cuda:1") for name, part in args.items()}
    assert torch.equal(ops.decode_attention(**there).cpu(), expected.cpu())


def test_formula_of_bytes():
    """The uniform layout's bytes a token, which the speed-up rests on."""
    c = pruned(random_rows(1, 1, 64, 128, dtype=torch.float16), 0.7)
    assert c.nbytes == 64 * (8 * words_for(128) + 2 * width_for(39)) == 0.375 * c.dense_nbytes
