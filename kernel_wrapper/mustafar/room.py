"""How much memory a static cache takes, and what to say where there is not enough."""

from __future__ import annotations

import torch

from mustafar.format import SLICE_TOKENS, width_for, words_for
from mustafar.settings import CacheSettings


class CacheDoesNotFit(torch.OutOfMemoryError):
    """There is no memory for a static cache.

    Attributes
    ----------
    largest_batch : int
        The largest batch with room for its cache, prompts not counted; 0 if one sequence is too much.
    """

    def __init__(self, message: str, largest_batch: int) -> None:
        super().__init__(message)
        self.largest_batch = largest_batch


def static_layer_bytes(settings: CacheSettings, keys: torch.Tensor, max_length: int) -> int:
    """Bytes of one layer of a static cache for tokens like `keys` [B, Hkv, *, D]."""
    batch, heads, _, head_dim = keys.shape
    item = keys.element_size()
    packed = max_length // SLICE_TOKENS * SLICE_TOKENS
    window = min(settings.window_capacity, max_length)
    a_head = 0
    for pruning in (settings.keys, settings.values):
        row = 8 * words_for(head_dim) + item * width_for(pruning.kept(head_dim))
        a_head += packed * row + window * head_dim * item
    return batch * heads * a_head


def free_bytes(device: torch.device) -> int:
    """What the allocator can still give out."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def does_not_fit(
    batch: int, max_length: int, layer: int, layers_there: int, layers_left: int, device: torch.device
) -> CacheDoesNotFit:
    """The error for the first layer without room.

    Parameters
    ----------
    layer : int
        Bytes of one layer.
    layers_there, layers_left : int
        Layers that have their memory on the device, and those that still want it.
    """
    needed = layer * (layers_there + layers_left)
    room = layer * layers_there + free_bytes(device)
    largest = min(room * batch // needed, batch - 1)
    advice = f"the largest batch with room for it is {largest}" if largest else "one sequence is too much"
    return CacheDoesNotFit(
        f"the static cache of a batch of {batch} and max_length {max_length} takes {_gib(needed)} on {device}, where "
        f"{_gib(room)} are left for it: {advice}, what computing a prompt takes not counted. A smaller max_length "
        "or a higher sparsity leaves room for more",
        largest,
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
