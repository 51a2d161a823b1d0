"""Matrix products of one input as one product: queries, keys and values; both halves of a gated MLP.

A decoded token reads every weight once, and a GPU reads one large matrix faster than several small ones: for a
Llama-3-8B on an H200, q, k and v apart take 26 us, of which reading takes 12. So the weights are laid one behind the
other in memory, where the model's own parameters become views of them: no bytes more, and nothing else of the model
changes. A captured step then multiplies once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

#: Parts of a module that transformers' decoders call one after the other with the same input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

MOST_LEFT = 1 << 30  # bytes of places that weights have left, before the allocator gives them back


def lay_together(model: nn.Module) -> int:
    """Give the weights of each group in `model` one piece of memory, layer by layer; returns how many groups have it.

    To be called before anything that remembers addresses of weights, such as a CUDA graph, and without effect a
    second time. Parts that are more than plain linear layers (quantised, divided among ranks, with adapters or
    hooks) stay as they are, and so does a group for whose copy there is no memory.
    """
    together = moved = 0
    for module, names in _groups(model):
        linears = [getattr(module, name) for name in names]
        if not _lie_together([linear.weight for linear in linears]):
            if not _lay(linears):
                continue
            moved += sum(linear.weight.nbytes for linear in linears)
        together += 1
        if moved > MOST_LEFT:
            torch.cuda.empty_cache()  # nobody else wants pieces of these sizes
            moved = 0
    if moved:
        torch.cuda.empty_cache()
    return together


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within it, groups that lie together are multiplied at once. Afterwards the model is as it was."""
    with contextlib.ExitStack() as undo:
        for module, names in _groups(model):
            linears = [getattr(module, name) for name in names]
            if not _lie_together([linear.weight for linear in linears]):
                continue
            first = _First(linears)
            parts = [first, *(_Later(first, i, linear) for i, linear in enumerate(linears[1:]))]
            for name, linear, part in zip(names, linears, parts, strict=True):
                undo.callback(module._modules.__setitem__, name, linear)
                module._modules[name] = part
        yield


class _First(nn.Module):
    """Computes its group's product, returns its own columns and keeps the others for those called next."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.register_buffer("weight", _as_one([linear.weight for linear in linears]), persistent=False)
        biases = [linear.bias for linear in linears]
        self.register_buffer("bias", None if biases[0] is None else torch.cat(biases), persistent=False)
        self.input: torch.Tensor | None = None
        self.others: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, *others = F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        self.input, self.others = x, tuple(others)
        return own


class _Later(nn.Module):
    """Returns what the first of its group computed for it, if that was for the same input."""

    def __init__(self, first: _First, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.first, self.index, self.linear = first, index, linear
        self.is_last = index == len(first.sizes) - 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.first.input:
            return self.linear(x)
        own = self.first.others[self.index]
        if self.is_last:
            self.first.input, self.first.others = None, ()
        return own


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    for module in list(model.modules()):
        for names in GROUPS:
            linears = [getattr(module, name, None) for name in names]
            if all(map(_is_plain, linears)) and len({_kind(linear) for linear in linears}) == 1:
                yield module, names


def _is_plain(linear: nn.Module | None) -> bool:
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and type(linear.weight.data) is torch.Tensor
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
        and linear.weight.is_contiguous()
        and not linear.weight.is_meta
    )


def _kind(linear: nn.Linear) -> tuple:
    weight = linear.weight
    return weight.dtype, weight.device, weight.shape[1], linear.bias is None


@torch.no_grad()
def _lay(linears: Sequence[nn.Linear]) -> bool:
    weights = [linear.weight for linear in linears]
    try:
        whole = torch.cat(weights)
    except torch.OutOfMemoryError:
        return False
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return True


def _lie_together(weights: Sequence[torch.Tensor]) -> bool:
    """Whether each begins where the one before it ends, in the same memory."""
    ends = weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        if not same or weight.storage_offset() != ends:
            return False
        ends += weight.numel()
    return True


def _as_one(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """What lies together as one matrix, not copied."""
    size = (sum(map(len, weights)), weights[0].shape[1])
    return weights[0].detach().as_strided(size, (size[1], 1))
