"""`StaticDenseLayer`: the dense form of a static cache, for where dense attention decodes faster.

It holds the values that `StaticMustafarLayer` holds, pruned at the same times, with their zeros. Appending and
attention are on the device, so that a graph can capture a step; pruning is not: once in `flush_every` steps the
loop that replays the graph calls `prune_when_due` between two of them. So it is for `mustafar.Decoder` alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from mustafar.counters import mark_static
from mustafar.layer import CompressedKV, check_states
from mustafar.settings import CacheSettings


class DenseState:
    """What the layers share: tokens held, on the host and on the device, and what a step's attention reads.

    Attributes
    ----------
    held, pruned : int
        Tokens held, and the oldest of them that are pruned; the host counts replayed steps itself.
    expected, capturing : bool
        Whether a single token may come: one after `prune_when_due`, any while a step is tried and captured.
    """

    def __init__(self) -> None:
        self.held = self.pruned = 0
        self.expected = self.capturing = False
        self.ready = False

    def prepare(self, batch: int, max_length: int, device: torch.device) -> None:
        whole = {"dtype": torch.int64, "device": device}
        self.total = torch.zeros((), **whole)
        self.place = torch.zeros(1, **whole)  # of the newest token
        self.slots = torch.arange(max_length, **whole)
        self.first = torch.arange(batch + 1, **whole) * max_length  # slot of each sequence
        self.begins = self.first.to(torch.int32)  # the first that it sees
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # how many it sees
        self.queries = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.seen = torch.zeros((batch, 1, 1, max_length), dtype=torch.bool, device=device)
        for tensor in (self.total, self.place, self.begins, self.lengths, self.seen):
            mark_static(tensor)
        self.ready = True

    def put(self, tokens: int, residual: int) -> None:
        """Set what is held, from the host, without waiting for the device."""
        self.held, self.pruned = tokens, max(0, tokens - residual)
        if self.ready:
            self.total.fill_(tokens)


class StaticDenseLayer(CacheLayerMixin):
    """Keys and values [B, max_length, Hkv, D] of one layer, of which the older are pruned.

    The first turn is a prompt, what follows single tokens; `reset` begins anew.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, settings: CacheSettings, layer_idx: int, max_length: int, state: DenseState, layers: int
    ) -> None:
        super().__init__()
        self.settings, self.layer_idx, self.layers = settings, layer_idx, layers
        self.max_length, self.state = max_length, state
        self.filled = False
        self.mask_checked = True  # `Decoder` passes where padding ends, not a mask

    def __repr__(self) -> str:
        return f"StaticDenseLayer(max_length={self.max_length})"

    @property
    def leads(self) -> bool:
        return self.layer_idx == 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the memory. Heads, head dim, dtype and device are those of the first tokens."""
        check_states(key_states, value_states, self.layer_idx, simulate=True)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.kv_heads, _, self.head_dim = key_states.shape
        self.keys = key_states.new_zeros((self.batch_size, self.max_length, self.kv_heads, self.head_dim))
        self.values = torch.zeros_like(self.keys)
        if self.leads:
            self.state.prepare(self.batch_size, self.max_length, self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens [B, Hkv, T, D]; returns what attention works on, as `MustafarLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        state, tokens = self.state, key_states.shape[2]
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if not self.filled:
            if tokens > self.max_length:
                raise ValueError(
                    f"max_length: the static cache has room for {self.max_length} tokens, got {tokens}"
                )
            self.keys[:, :tokens] = keys
            self.values[:, :tokens] = values
            self.filled = True
            if self.leads:
                state.put(tokens, self.settings.residual_length)
            self.prune(0, state.pruned)
            return key_states, value_states
        if tokens != 1 or not (state.expected or state.capturing):
            raise NotImplementedError(
                'a static cache with backend="auto" that chose dense attention is decoded by mustafar.Decoder, a '
                'prompt and then single tokens; make one with backend="kernel" for generate() and several turns'
            )
        if self.leads:
            state.place.copy_(state.total.view(1))
            state.total.add_(1)
        self.keys.index_copy_(1, state.place, keys)
        self.values.index_copy_(1, state.place, values)
        if self.layer_idx == self.layers - 1:
            state.expected = False
        handle = CompressedKV(self)
        return handle, handle

    def prune(self, first: int, last: int) -> None:
        """Set to zero what pruning removes of the tokens `first` to `last`."""
        if last <= first:
            return
        for buffer, pruning in ((self.keys, self.settings.keys), (self.values, self.settings.values)):
            part = buffer[:, first:last]
            part.copy_(pruning.prune(part.transpose(1, 2)).transpose(1, 2))

    def attend(
        self, query: torch.Tensor, starts: torch.Tensor | None, scaling: float | None, sliding_window: int
    ) -> torch.Tensor:
        """Attention of query [B, H, D] over all tokens held."""
        state = self.state
        if self.leads:
            self._see(starts, sliding_window)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return torch.ops.aten._flash_attention_forward(
                query, self.keys.flatten(0, 1), self.values.flatten(0, 1), state.queries, state.begins, 1,
                self.max_length, 0.0, False, False, scale=scaling, seqused_k=state.lengths,
            )[0]  # fmt: skip
        rows = query.unflatten(1, (self.kv_heads, -1))
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return F.scaled_dot_product_attention(rows, keys, values, state.seen, scale=scaling).flatten(1, 2)

    def _see(self, starts: torch.Tensor | None, sliding_window: int) -> None:
        """Which tokens this step's attention sees, for all layers, on the device."""
        state = self.state
        begin = torch.zeros_like(state.lengths) if starts is None else starts
        if sliding_window:
            begin = torch.maximum(begin, state.total - sliding_window)
        state.lengths.copy_(state.total - begin)
        state.begins[:-1].copy_(state.first[:-1] + begin)
        seen = (state.slots < state.total) & (state.slots >= begin[:, None])
        state.seen.copy_(seen[:, None, None])

    def get_seq_length(self, *args: Any) -> int:
        return self.state.held if self.filled else 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        if isinstance(query_length, torch.Tensor) and query_length.dim() > 0:
            query_length = query_length.shape[0]  # before transformers 5.4: the positions of the queries
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def nbytes(self) -> list[dict[str, int]]:
        if not self.is_initialized:
            return []
        held = self.keys[:, :1].nbytes * self.get_seq_length()
        names = ("compressed_bytes", "window_bytes", "dense_equivalent_bytes", "allocated_bytes")
        sizes = dict(zip(names, (0, held, held, self.keys.nbytes), strict=True))
        return [sizes, dict(sizes)]

    def reset(self) -> None:
        """Forget the tokens and keep the memory, for the next prompt."""
        self.filled = False
        if self.leads:
            self.state.put(0, 0)
            self.state.expected = self.state.capturing = False

    def reorder_cache(self, *args: Any) -> NoReturn:
        raise NotImplementedError(
            'beam search, cropping and other batch sizes take MustafarCache(..., backend="kernel")'
        )

    crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = reorder_cache


def prune_when_due(layers: list[StaticDenseLayer]) -> None:
    """To be called before every step, captured or not: prunes if it is time, and counts the step's token.

    Raises
    ------
    ValueError
        If there is no room for the token.
    """
    state, settings = layers[0].state, layers[0].settings
    if state.held >= layers[0].max_length:
        raise ValueError(f"max_length: the static cache has room for {state.held} tokens, and they are there")
    if state.held - state.pruned >= settings.residual_length + settings.flush_every:
        last = state.held - settings.residual_length
        for layer in layers:
            layer.prune(state.pruned, last)
        state.pruned = last
    state.held += 1
    state.expected = True
