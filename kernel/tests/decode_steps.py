"""Decode steps for the tests of the attention kernels: arguments, and what PyTorch makes of them. CPU and GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases import rows
from mustafar import ops, reference
from mustafar.format import CompressedTensor, slices_for, width_for
from mustafar.testing import accuracy

HALF = (torch.float16, torch.bfloat16)
LAYOUTS = ("uniform", "general")
BATCHED = (
    "q",
    "k",
    "v",
    "k_window",
    "v_window",
    "lengths",
    "starts",
)  # arguments with a first dim of sequences
GPU_MARKS = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))

# The ops dispatch by device, so a test of what they do runs on both.
on_each_target = pytest.mark.parametrize(
    "device,dtype",
    [
        pytest.param(
            device, dtype, id=f"{device}-{str(dtype)[6:]}", marks=GPU_MARKS if device == "cuda" else ()
        )
        for device in ("cpu", "cuda")
        for dtype in HALF
    ],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU_MARKS)])


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same on every device. Drawn there only where they are too many to bring."""
    where = device if torch.Size(shape).numel() > 1 << 24 else "cpu"
    g = torch.Generator(device=where).manual_seed(seed)
    return torch.randn(shape, generator=g, device=where, dtype=torch.float32).to(device=device, dtype=dtype)


def packed(x: torch.Tensor, layout: str, kept: int) -> CompressedTensor:
    """At most `kept` values of every row. The general layout has rows with fewer and without any."""
    keep = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.abs().topk(kept, dim=-1).indices, True)
    if layout == "uniform":
        return reference.pack(x, keep, width_for(kept))
    keep[:, :, 1::3, : x.shape[3] // 2] = False
    keep[:, :, 5::7] = False
    return reference.pack(x, keep, None)


def step(
    device: str,
    dtype: torch.dtype,
    *,
    batch=2,
    heads=2,
    group=4,
    tokens=130,
    head_dim=128,
    window=40,
    kept=(39, 64),
    layouts=("uniform", "uniform"),
    pattern="normal",
    q_scale=1.0,
    lengths=None,
    **options,
) -> dict:
    """Arguments of `ops.decode_attention`: `kept` and `layouts` of keys and values, `options` as the op has them."""
    options = {
        n: torch.tensor(x, dtype=torch.int32, device=device) if n == "starts" else x
        for n, x in options.items()
    }
    if pattern == "normal":
        dense = [randn(batch, heads, tokens, head_dim, device=device, dtype=dtype, seed=s) for s in (1, 2)]
    else:
        dense = [rows(pattern, batch, heads, tokens, head_dim, seed=s).to(device, dtype) for s in (1, 2)]
    k, v = (packed(x, *how) for x, *how in zip(dense, layouts, [min(n, head_dim) for n in kept], strict=True))
    return {
        "q": randn(batch, heads * group, head_dim, device=device, dtype=dtype, seed=3) * q_scale,
        "k": k,
        "v": v,
        "k_window": randn(batch, heads, window, head_dim, device=device, dtype=dtype, seed=4),
        "v_window": randn(batch, heads, window, head_dim, device=device, dtype=dtype, seed=5),
        "lengths": torch.tensor(lengths or [[tokens, window]] * batch, dtype=torch.int32, device=device),
        **options,
    }  # fmt: skip


def crowd(args: dict, sequences: int) -> dict:
    """The step of one sequence for so many of the same: where a GPU is full, a warp goes from slice to slice."""

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.expand(sequences, *x.shape[1:]).contiguous()

    return {n: x if x is None or n not in BATCHED else of_sequences(x, repeated) for n, x in args.items()}


def of_sequences(
    x: torch.Tensor | CompressedTensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | CompressedTensor:
    """`change` done to a tensor, or to what a compressed one has of each sequence."""
    if isinstance(x, torch.Tensor):
        return change(x)
    names = ("bitmap", "values") if x.is_uniform else ("bitmap", "offsets", "widths")
    return dataclasses.replace(x, **{n: change(getattr(x, n)) for n in names})


def sdpa(args: dict) -> torch.Tensor:
    """The step in its own dtype by PyTorch's scaled_dot_product_attention on dense tensors with zeros."""
    q, lengths = args["q"], args["lengths"]
    seen = reference.visible(
        lengths, args.get("starts"), args.get("sliding_window", 0), int(lengths.sum(-1).max())
    )

    def joined(c: CompressedTensor, window: torch.Tensor) -> torch.Tensor:
        dense, out = reference.decompress(c), q.new_zeros(*c.shape[:2], seen.shape[1], c.head_dim)
        for b, (compressed, recent) in enumerate(lengths.tolist()):
            out[b, :, :compressed] = dense[b, :, :compressed]
            out[b, :, compressed : compressed + recent] = window[b, :, :recent]
        return out.repeat_interleave(q.shape[1] // c.shape[1], 1)

    keys, values = joined(args["k"], args["k_window"]), joined(args["v"], args["v_window"])
    mask = None if bool(seen.all()) else seen[:, None, None]
    scale = args.get("scale", q.shape[2] ** -0.5)
    # Flash attention takes the maximum before it scales: no good with a negative scale.
    q = (q if scale >= 0 else -q)[:, :, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=abs(scale))
    return torch.where(seen.any(-1)[:, None, None], out[:, :, 0], 0)


def in_float32(args: dict) -> torch.Tensor:
    """The reference in float32, sequence by sequence: it unpacks the whole batch for each."""
    batched = {n: x for n, x in args.items() if n in BATCHED and x is not None}
    rest = {n: x for n, x in args.items() if n not in batched}
    steps = [{n: sequences(x, slice(b, b + 1)) for n, x in batched.items()} for b in range(len(args["q"]))]
    return torch.cat([reference.decode_attention(**one, **rest) for one in steps])


def sequences(x: torch.Tensor | CompressedTensor, part: slice) -> torch.Tensor | CompressedTensor:
    """Some of the sequences of a tensor, compressed or not."""
    return of_sequences(x, lambda tensor: tensor[part])


def assert_attends(got: torch.Tensor, args: dict, what: object = "") -> None:
    """`got` is at most twice as far from float32 as PyTorch's SDPA in the same dtype."""
    assert_accurate(got, sdpa(args), in_float32(args), what)


def assert_accurate(got: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, what: object = "") -> None:
    assert torch.isfinite(exact).all(), f"{what}: the test itself is wrong"
    result = accuracy(got, peer, exact)
    assert result.ok, f"{what}: {result}"


def assert_multiplies(q: torch.Tensor, c: CompressedTensor, what: object = "") -> None:
    """The two SpMVs of the queries, or of weights drawn here, with the same compressed tensor."""
    dense = reference.decompress(c).repeat_interleave(q.shape[1] // c.shape[1], 1)
    peer = torch.einsum("bhd,bhtd->bht", q, dense)
    exact = torch.einsum("bhd,bhtd->bht", q.float(), dense.float())
    assert_accurate(ops.key_scores(q, c), peer, exact, ("key_scores", what))
    p = (
        randn(*q.shape[:2], c.tokens, device=q.device.type, dtype=torch.float32, seed=6)
        .softmax(-1)
        .to(q.dtype)
    )
    peer = torch.einsum("bht,bhtd->bhd", p, dense)
    exact = torch.einsum("bht,bhtd->bhd", p.float(), dense.float())
    assert_accurate(ops.value_output(p, c), peer, exact, ("value_output", what))


def assert_like_dense(got: torch.Tensor, exact: torch.Tensor, what: object = "") -> None:
    """NaN and infinities where float32 has them, and the finite results close to it."""
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN elsewhere than in float32"
    infinite = exact.isinf()
    assert torch.equal(got.isinf(), infinite), f"{what}: infinities elsewhere than in float32"
    assert torch.equal(got[infinite].float(), exact[infinite]), f"{what}: the sign of an infinity"
    finite, eps = exact.isfinite(), torch.finfo(got.dtype).eps
    if finite.any():
        error = (got.float() - exact)[finite].abs().max()
        assert error <= 4 * eps * max(1.0, float(exact[finite].abs().max())), f"{what}: error {error}"


def with_garbage(c: CompressedTensor, tokens: list[int]) -> CompressedTensor:
    """Fill the slices of sequence b past its first `tokens[b]` tokens as memory that was never written may be."""
    parts = {
        n: getattr(c, n).clone()
        for n in ("bitmap", "values", *(() if c.is_uniform else ("offsets", "widths")))
    }
    for b, filled in enumerate(map(slices_for, tokens)):
        parts["bitmap"][b, :, filled:] = -1
        if c.is_uniform:
            parts["values"][b, :, filled:] = torch.nan
        else:
            parts["offsets"][b, :, filled:] = 1 << 40
            parts["widths"][b, :, filled:] = 1 << 20
    return dataclasses.replace(c, **parts)
