"""Every public op refuses wrong arguments, and says which one it is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mustafar import CompressedTensor, ops, reference

B, HKV, G, T, D, CAPACITY = 2, 2, 3, 130, 80, 20
SLICES = 3
ERRORS = (ValueError, TypeError, RuntimeError, IndexError)
Arguments = dict[str, Any]


def dense(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def uniform() -> CompressedTensor:
    return reference.prune_compress(dense(B, HKV, T, D), 20)


def general() -> CompressedTensor:
    return reference.compress(dense(B, HKV, T, D).relu())


def valid(op: str) -> Arguments:
    """Arguments that the op takes."""
    x, q = dense(B, HKV, T, D), dense(B, HKV * G, D)
    window = dense(B, HKV, CAPACITY, D)
    match op:
        case "prune_compress":
            return {"x": x, "k": 20}
        case "compress":
            return {"x": x}
        case "decompress":
            return {"c": general()}
        case "key_scores":
            return {"q": q, "c": general()}
        case "value_output":
            return {"p": dense(B, HKV * G, T), "c": general()}
        case "decode_attention":
            return {
                "q": q, "k": uniform(), "v": general(), "k_window": window, "v_window": window.clone(),
                "lengths": torch.tensor([[T, CAPACITY], [3, 0]], dtype=torch.int32),
                "starts": torch.tensor([0, 2], dtype=torch.int32), "scale": 0.1, "sliding_window": 0,
            }  # fmt: skip
        case "window_advance":
            return {
                "state": torch.zeros(ops.WINDOW_ENTRIES, dtype=torch.int32),
                "lengths": torch.zeros(B, 2, dtype=torch.int32), "total": torch.zeros(1, dtype=torch.int64),
                "residual": 8, "flush_every": 4, "max_length": 64 * SLICES,
            }  # fmt: skip
        case "window_append":  # the state after a step that pruned
            token = dense(B, HKV, 1, D)
            state = torch.tensor([64, 12, 68, 11, 0, 4, 11, 0], dtype=torch.int32)
            return {
                "k": token, "v": token.clone(), "k_store": uniform(), "v_store": uniform(),
                "k_window": window, "v_window": window.clone(), "state": state, "k_kept": 20, "v_kept": 20,
            }  # fmt: skip
    raise AssertionError(op)


def part(name: str, change: Callable[[Any], Any]) -> Callable[[CompressedTensor], CompressedTensor]:
    """A change of one field of a compressed tensor."""
    return lambda c: dataclasses.replace(c, **{name: change(getattr(c, name))})


def every_other(x: torch.Tensor) -> torch.Tensor:
    """x with a last dimension that is not contiguous."""
    return x.repeat_interleave(2, -1)[..., ::2]


def gap_before(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor whose dimension `dim` is strided."""
    return lambda x: torch.cat([x, x], dim).narrow(dim, 0, x.shape[dim])


# What is wrong with a compressed tensor: the change, and what the message names.
COMPRESSED = {
    "bitmap int32": (part("bitmap", torch.Tensor.int), "bitmap"),
    "bitmap 4 dims": (part("bitmap", lambda x: x[0]), "bitmap"),
    "bitmap without a word": (part("bitmap", lambda x: x[..., :1]), "bitmap"),
    "bitmap of 32 rows": (part("bitmap", lambda x: x[:, :, :, :32]), "bitmap"),
    "bitmap strided": (part("bitmap", gap_before(3)), "bitmap"),
    "values int32": (part("values", torch.Tensor.int), "values"),
    "values float64": (part("values", torch.Tensor.double), "values"),
}
GENERAL = {
    "offsets missing": (part("offsets", lambda x: None), "offsets"),
    "widths missing": (part("widths", lambda x: None), "widths"),
    "offsets int32": (part("offsets", torch.Tensor.int), "offsets"),
    "widths int64": (part("widths", torch.Tensor.long), "widths"),
    "offsets of another batch": (part("offsets", lambda x: x[:1]), "offsets"),
    "widths of fewer slices": (part("widths", lambda x: x[..., :1]), "widths"),
    "offsets strided": (part("offsets", every_other), "offsets"),
    "values 2 dims": (part("values", lambda x: x.view(-1, 8)), "values"),
}
UNIFORM = {
    "values of fewer slices": (part("values", lambda x: x[:, :, :1]), "values"),
    "values 5 dims": (part("values", lambda x: x[..., 0]), "values"),
    "values strided": (part("values", gap_before(3)), "values"),
}
TOKENS = {
    "tokens negative": (part("tokens", lambda x: -1), "tokens|shape"),
    "tokens past the slices": (part("tokens", lambda x: SLICES * 64 + 1), "tokens|shape"),
    "tokens overflowing": (part("tokens", lambda x: 2**63 - 1), "tokens|shape"),
    "tokens beyond int64": (part("tokens", lambda x: 2**64), "tokens|shape|int|integer"),
}
X = {
    "x 3 dims": (lambda x: x[0], "x"),
    "x float64": (torch.Tensor.double, "x"),
    "x integers": (torch.Tensor.int, "x"),
    "x of no channels": (lambda x: x[..., :0], "head_dim|x"),
    "x of 257 channels": (lambda x: x.repeat(1, 1, 1, 4)[..., :257], "head_dim|x"),
    "x last dim strided": (every_other, "x"),
}
Q = {
    "q 2 dims": (lambda x: x[0], "q"),
    "q float64": (torch.Tensor.double, "q"),
    "q of another dtype": (torch.Tensor.bfloat16, "dtype"),
    "q of another batch": (lambda x: x[:1], "batch"),
    "q heads no multiple": (lambda x: x[:, :-1], "q_heads"),
    "q of no heads": (lambda x: x[:, :0], "q_heads"),
    "q of another head dim": (lambda x: x[..., :-20], "bitmap|k_window.shape"),
    "q last dim strided": (every_other, "q"),
}
WINDOW = {
    "3 dims": (lambda x: x[0], ""),
    "of another dtype": (torch.Tensor.bfloat16, ""),
    "of another batch": (lambda x: x[:1], ""),
    "of other heads": (lambda x: x[:, :1], ""),
    "of another head dim": (lambda x: x[..., :-1], ""),
    "of another capacity": (lambda x: x[:, :, :-1], "v_window"),
    "last dim strided": (every_other, ""),
}
LENGTHS = {
    "lengths int64": (torch.Tensor.long, "lengths"),
    "lengths 1 dim": (lambda x: x[0], "lengths"),
    "lengths of another batch": (lambda x: x[:1], "lengths"),
    "lengths of three": (lambda x: torch.cat([x, x], 1)[:, :3].contiguous(), "lengths"),
    "lengths strided": (every_other, "lengths"),
    "lengths negative": (lambda x: x - 1000, "lengths"),
    "lengths past the slices": (lambda x: x + torch.tensor([SLICES * 64, 0], dtype=torch.int32), "lengths"),
    "lengths past the window": (lambda x: x + torch.tensor([0, 1], dtype=torch.int32), "lengths"),
    "lengths overflowing": (lambda x: torch.full_like(x, 2**31 - 1), "lengths"),
}
STARTS = {
    "starts int64": (torch.Tensor.long, "starts"),
    "starts 2 dims": (lambda x: x[None], "starts"),
    "starts of another batch": (lambda x: x[:1], "starts"),
    "starts strided": (every_other, "starts"),
}
SLIDING = {
    "sliding_window negative": (lambda x: -1, "sliding_window"),
    "sliding_window overflowing": (lambda x: 2**31, "sliding_window"),
    "sliding_window beyond int64": (lambda x: 2**63, "sliding_window"),
    "sliding_window float": (lambda x: 1.5, "sliding_window"),
}
K = {
    "k zero": (lambda k: 0, "k"),
    "k negative": (lambda k: -1, "k"),
    "k past the head dim": (lambda k: D + 1, "k"),
    "k overflowing": (lambda k: 2**63 - 1, "k"),
    "k float": (lambda k: 1.5, "k"),
}
P = {
    "p 2 dims": (lambda x: x[0], "p"),
    "p float64": (torch.Tensor.double, "p"),
    "p of another dtype": (torch.Tensor.bfloat16, "dtype"),
    "p of another batch": (lambda x: x[:1], "p"),
    "p heads no multiple": (lambda x: x[:, :-1], "heads"),
    "p of fewer tokens": (lambda x: x[..., :-1], "p"),
    "p last dim strided": (every_other, "p"),
}
Faults = dict[str, tuple[Callable[[Any], Any], str]]


def named(argument: str, *groups: Faults) -> Faults:
    """These faults where the message must name the argument itself."""
    return {what: (change, argument) for group in groups for what, (change, _) in group.items()}


def entry(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of one counter of a static cache."""
    return lambda x: x.index_fill(0, torch.tensor(index), value)


def over_heads(x: torch.Tensor) -> torch.Tensor:
    """x with one memory for all heads."""
    return x[:, :1].expand_as(x)


ELSEWHERE: Faults = {"on another device": (lambda x: x.to("meta"), "")}
INTEGER: Faults = {
    "negative": (lambda n: -1, ""),
    "overflowing": (lambda n: 2**31, ""),
    "beyond int64": (lambda n: 2**63, ""),
    "float": (lambda n: 1.5, ""),
}
COUNTERS: Faults = ELSEWHERE | {
    "of another dtype": (torch.Tensor.float, ""),
    "too short": (lambda x: x[:-1] if len(x) > 1 else x[:0], ""),
    "too long": (lambda x: torch.cat([x, x]), ""),
    "strided": (lambda x: torch.stack([x, x], -1)[..., 0] if x.numel() > 1 else x.repeat(2), ""),
    "expanded": (lambda x: x[:1].expand(2 * len(x)), ""),
}
ADVANCED: Faults = {
    "compressed tokens negative": (entry(0, -64), ""),
    "compressed tokens no whole slice": (entry(0, 3), ""),
    "window negative": (entry(1, -1), ""),
    "tokens overflowing": (entry(1, 2**31 - 1), ""),
    "fewer pruned than compressed": (entry(2, -1), ""),
    "more pruned than there are": (entry(2, 1), ""),
    "overflow negative": (entry(7, -1), ""),
    "overflow overflowing": (entry(7, 2**31 - 1), ""),
}
TO_APPEND: Faults = {
    "compressed tokens past the slices": (entry(0, 64 * (SLICES + 1)), ""),
    "compressed tokens no whole slice": (entry(0, 65), ""),
    "compressed tokens negative": (entry(0, -64), ""),
    "slot past the window": (entry(3, CAPACITY), ""),
    "slot negative": (entry(3, -2), ""),
    "rows to compress negative": (entry(4, -64), ""),
    "rows to compress past the window": (entry(4, 64), ""),
    "rows to prune negative": (entry(5, -1), ""),
    "rows to prune past the window": (entry(5, 12), ""),
    "old window past the capacity": (entry(6, CAPACITY + 1), ""),
}
TOKEN: Faults = ELSEWHERE | {
    "3 dims": (lambda x: x[0], ""),
    "float64": (torch.Tensor.double, ""),
    "of another dtype": (torch.Tensor.bfloat16, ""),
    "two tokens": (lambda x: x.repeat(1, 1, 2, 1), ""),
    "no token": (lambda x: x[:, :, :0], ""),
    "of another batch": (lambda x: x[:1], ""),
    "of other heads": (lambda x: x[:, :1], ""),
    "of another head dim": (lambda x: x[..., :-1], ""),
    "of no channels": (lambda x: x[..., :0], ""),
    "of 257 channels": (lambda x: x.repeat(1, 1, 1, 4)[..., :257], ""),
    "last dim strided": (every_other, ""),
}
SHAPES_OF_LENGTHS = ("lengths int64", "lengths 1 dim", "lengths of three", "lengths strided")
WRITTEN: Faults = ELSEWHERE | {"expanded over the heads": (over_heads, "")}
STORE: Faults = {
    "bitmap on another device": (part("bitmap", lambda x: x.to("meta")), ""),
    "values on another device": (part("values", lambda x: x.to("meta")), ""),
    "bitmap expanded over the heads": (part("bitmap", over_heads), ""),
    "values expanded over the heads": (part("values", over_heads), ""),
    "of another batch": (lambda c: dataclasses.replace(c, bitmap=c.bitmap[:1], values=c.values[:1]), ""),
    "values of fewer slots": (part("values", lambda x: x[:, :, :, :-1].contiguous()), ""),
    "values of another dtype": (part("values", torch.Tensor.bfloat16), ""),
    "in the general layout": (lambda c: general(), ""),
}
WRONG: dict[str, dict[str, Faults]] = {
    "prune_compress": {"x": X, "k": K},
    "compress": {"x": X},
    "decompress": {"c": COMPRESSED | GENERAL | TOKENS},
    "key_scores": {"q": Q, "c": COMPRESSED | GENERAL | TOKENS},
    "value_output": {"p": P, "c": COMPRESSED | GENERAL},
    "decode_attention": {
        "q": Q,
        "k": COMPRESSED | UNIFORM,
        "v": COMPRESSED | GENERAL,
        "k_window": WINDOW,
        "v_window": WINDOW,
        "lengths": LENGTHS,
        "starts": STARTS,
        "sliding_window": SLIDING,
    },
    "window_advance": {
        "state": named("state", COUNTERS, ADVANCED),
        "lengths": named("lengths", ELSEWHERE, {what: LENGTHS[what] for what in SHAPES_OF_LENGTHS}),
        "total": named("total", COUNTERS),
        "residual": named("residual", INTEGER),
        "flush_every": named("flush_every", INTEGER, {"zero": (lambda n: 0, "")}),
        "max_length": named("max_length", INTEGER),
    },
    "window_append": {
        "k": named("k", TOKEN),
        "v": named("v", TOKEN),
        "k_store": named("k_store", COMPRESSED, UNIFORM, STORE),
        "v_store": named("v_store", COMPRESSED, UNIFORM, STORE),
        "k_window": named("k_window", WINDOW, WRITTEN),
        "v_window": named("v_window", WINDOW, WRITTEN),
        "state": named("state", COUNTERS, TO_APPEND),
        "k_kept": named(
            "k_kept", INTEGER, {"zero": (lambda n: 0, ""), "past the head dim": (lambda n: D + 1, "")}
        ),
        "v_kept": named(
            "v_kept", INTEGER, {"zero": (lambda n: 0, ""), "past the head dim": (lambda n: D + 1, "")}
        ),
    },
}
CASES = [
    pytest.param(op, argument, change, word or argument, id=f"{op}-{argument}-{what}".replace(" ", "_"))
    for op, arguments in WRONG.items()
    for argument, faults in arguments.items()
    for what, (change, word) in faults.items()
]


@pytest.mark.parametrize("op", WRONG)
def test_valid_arguments_are_taken(op):
    getattr(ops, op)(**valid(op))


@pytest.mark.parametrize(("op", "argument", "change", "word"), CASES)
def test_wrong_argument_is_named(op, argument, change, word):
    arguments = valid(op)
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ERRORS, match=rf"\b({word})\b"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    ("op", "argument"), [(op, name) for op in WRONG for name in valid(op) if len(valid(op)) > 1]
)
def test_mixed_devices_are_refused(op, argument, device):
    arguments = valid(op)
    if not isinstance(arguments[argument], (torch.Tensor, CompressedTensor)) or op == "prune_compress":
        pytest.skip("the only tensor")
    arguments[argument] = arguments[argument].to(device)
    with pytest.raises(ERRORS, match="device"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("field", ["bitmap", "values", "offsets", "widths"])
def test_a_compressed_tensor_on_two_devices_is_refused(field):
    c = dataclasses.replace(general(), **{field: getattr(general(), field).to("meta")})
    with pytest.raises(ERRORS, match=r"device|meta"):
        c.validate()


def test_every_public_op_is_here():
    public = {
        name for name, member in vars(ops).items()
        if inspect.isfunction(member) and member.__module__ == ops.__name__ and not name.startswith("_")
    }  # fmt: skip
    only_a_size = {"decode_attention_workspace"}  # checked where it is used
    assert public - only_a_size == set(WRONG)
