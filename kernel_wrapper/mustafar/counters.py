"""`Counters`: what a static cache knows of its tokens, on the device."""

from __future__ import annotations

import torch

from mustafar import ops


class Counters:
    """What the layers on one device share: tokens held, this step's decision, memory for attention.

    Attributes
    ----------
    state : Tensor, int32 [WINDOW_ENTRIES]
    lengths : Tensor, int32 [B, 2]
        Compressed and window tokens of every sequence.
    total : Tensor, int64
        Tokens held.
    workspace : Tensor, uint8
        For decode attention, which must not allocate inside a capture. Empty on a CPU, not None: torch.compile
        fails on an argument that an op might write and that is None.
    """

    def __init__(self, batch: int, device: torch.device, leader: int) -> None:
        self.state = torch.zeros(ops.WINDOW_ENTRIES, dtype=torch.int32, device=device)
        self.lengths = torch.zeros((batch, 2), dtype=torch.int32, device=device)
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)
        self.leader = leader  # the first layer on the device: it advances the counters
        self.layers = 0  # that have their memory there
        self.before = (0, 0, 0)  # packed, window, pruned tokens before the turn of several tokens under way
        for tensor in (self.state, self.lengths, self.total):
            mark_static(tensor)

    def reserve(self, query: torch.Tensor, kv_heads: int, slices: int, capacity: int) -> None:
        """Make the workspace large enough for queries like `query` [B, H, D]."""
        needed = ops.decode_attention_workspace(query, kv_heads, slices, capacity)
        if self.workspace.nbytes < needed.nbytes:
            self.workspace = needed
            mark_static(needed)

    def put(self, packed: int, window: int, pruned: int) -> None:
        """Set what is held, from the host, without waiting for the device."""
        self.state.zero_()
        for entry, value in (
            (ops.WINDOW_PACKED, packed),
            (ops.WINDOW_HELD, window),
            (ops.WINDOW_PRUNED, pruned),
        ):
            self.state[entry].fill_(value)
        self.lengths[:, 0].fill_(packed)
        self.lengths[:, 1].fill_(window)
        self.total.fill_(packed + window)

    def read(self) -> tuple[int, int, int]:
        """Packed, window and pruned tokens. Waits for the device."""
        state = self.state.tolist()
        return state[ops.WINDOW_PACKED], state[ops.WINDOW_HELD], state[ops.WINDOW_PRUNED]


def mark_static(tensor: torch.Tensor) -> None:
    """Tell torch.compile that the tensor stays where it is, so that its graphs change it in place."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
