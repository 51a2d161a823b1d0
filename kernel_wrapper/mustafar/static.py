"""`StaticMustafarLayer`: a layer of fixed size, whose decode step a CUDA graph can capture.

It prunes at the same times and to the same values as `MustafarLayer`. What changes from one decoded token to
the next is on the device: counters that `ops.window_advance` moves once a step for all layers, and that
`ops.window_append` and decode attention read. So a step has no size and no choice that the host must know.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from mustafar import ops
from mustafar.counters import Counters, mark_static
from mustafar.format import SLICE_TOKENS, VECTOR_VALUES, CompressedTensor, width_for, words_for
from mustafar.layer import CompressedKV, check_states, raise_on_nan
from mustafar.multi_query import MOST_QUERIES, attend_rows
from mustafar.pruning import Pruning
from mustafar.room import does_not_fit, static_layer_bytes
from mustafar.settings import CacheSettings


class StaticHistory:
    """Keys or values of one layer: room for all slices, and the window."""

    def __init__(self, pruning: Pruning, x: torch.Tensor, max_length: int, window_capacity: int) -> None:
        batch, heads, _, head_dim = x.shape
        self.pruning = pruning
        self.kept = pruning.kept(head_dim)
        slices = max_length // SLICE_TOKENS
        lead = (batch, heads, slices)
        vectors = width_for(self.kept) // VECTOR_VALUES
        self.store = CompressedTensor(
            x.new_zeros((*lead, SLICE_TOKENS, words_for(head_dim)), dtype=torch.int64),
            x.new_zeros((*lead, vectors, SLICE_TOKENS, VECTOR_VALUES)),
            None,
            None,
            slices * SLICE_TOKENS,
            head_dim,
        )
        self.window = x.new_zeros((batch, heads, min(window_capacity, max_length), head_dim))
        for tensor in self.buffers():
            mark_static(tensor)

    def buffers(self) -> tuple[torch.Tensor, ...]:
        return self.store.bitmap, self.store.values, self.window

    def settle(self, tail: torch.Tensor, packed: int, pruned: int) -> int:
        """Let `tail` [B, Hkv, n, D] follow the `packed` tokens, with the oldest `pruned` of all pruned.

        Returns the tokens packed now; the others are in the window. Pruning what is pruned changes nothing.
        """
        last = max(pruned - packed, 0)
        whole = last - last % SLICE_TOKENS
        if whole:
            c = ops.prune_compress(tail[:, :, :whole], self.kept)
            first = packed // SLICE_TOKENS
            there = slice(first, first + whole // SLICE_TOKENS)
            self.store.bitmap[:, :, there].copy_(c.bitmap)
            self.store.values[:, :, there].copy_(c.values)
        if last > whole:
            between = self.pruning.prune(tail[:, :, whole:last])
            rest = torch.cat([between, tail[:, :, last:]], dim=2)
        else:
            rest = tail[:, :, whole:]
            if rest.untyped_storage().data_ptr() == self.window.untyped_storage().data_ptr():
                rest = rest.clone()
        self.window[:, :, : rest.shape[2]] = rest
        return packed + whole

    def held(self, packed: int) -> CompressedTensor:
        """The compressed tokens, not copied."""
        slices = packed // SLICE_TOKENS
        return CompressedTensor(
            self.store.bitmap[:, :, :slices],
            self.store.values[:, :, :slices],
            None,
            None,
            packed,
            self.store.head_dim,
        )

    def dense(self, packed: int, tail: torch.Tensor) -> torch.Tensor:
        """The compressed tokens and a `tail` [B, Hkv, n, D] behind them: a copy."""
        return torch.cat([ops.decompress(self.held(packed)), tail], dim=2) if packed else tail.clone()

    def nbytes(self, packed: int, window: int) -> dict[str, int]:
        batch, heads, _, head_dim = self.window.shape
        token = batch * heads * head_dim * self.window.element_size()
        slices = max(1, self.store.bitmap.shape[2])
        return {
            "compressed_bytes": self.store.nbytes * (packed // SLICE_TOKENS) // slices,
            "window_bytes": token * window,
            "dense_equivalent_bytes": token * (packed + window),
            "allocated_bytes": self.store.nbytes + self.window.nbytes,
        }


class StaticMustafarLayer(CacheLayerMixin):
    """Keys and values of one layer in memory taken once, for `max_length` tokens.

    A first turn, and later turns of several tokens, run on the host as in `MustafarLayer`, the latter at the
    price of a synchronisation; the first and long ones attend densely. A turn longer than `flush_every`, or
    than what is left of the window, is pruned at once.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = False
    supports_early_init = True

    def __init__(
        self,
        settings: CacheSettings,
        layer_idx: int,
        max_length: int,
        group: int,
        shared: dict[torch.device, Counters],
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx
        self.max_length = max_length
        self.group = group  # query heads per KV head
        self.shared = shared
        self.layers = layers  # of the model
        self.filled = False  # a first turn has been seen
        self.mask_checked = False
        self.turn = (0, 0)  # packed and window tokens after the last turn of several tokens

    def __repr__(self) -> str:
        return f"StaticMustafarLayer(max_length={self.max_length})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Take the memory. Heads, head dim, dtype and device are those of the first tokens.

        Raises
        ------
        CacheDoesNotFit
            Naming the largest batch that would fit.
        """
        value_states = key_states if value_states is None else value_states
        check_states(key_states, value_states, self.layer_idx, simulate=False)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.kv_heads, _, self.head_dim = key_states.shape
        new = self.device not in self.shared
        counters = Counters(self.batch_size, self.device, self.layer_idx) if new else self.shared[self.device]
        try:
            self._take_memory(key_states, value_states, counters)
        except torch.OutOfMemoryError:
            self.key_history = self.value_history = None
            raise does_not_fit(
                self.batch_size,
                self.max_length,
                static_layer_bytes(self.settings, key_states, self.max_length),
                counters.layers,
                self.layers - self.layer_idx,
                self.device,
            ) from None
        self.counters = self.shared[self.device] = counters
        counters.layers += 1
        self.is_initialized = True

    def _take_memory(self, keys: torch.Tensor, values: torch.Tensor, counters: Counters) -> None:
        capacity = self.settings.window_capacity
        self.key_history = StaticHistory(self.settings.keys, keys, self.max_length, capacity)
        self.value_history = StaticHistory(self.settings.values, values, self.max_length, capacity)
        query = keys.new_empty((self.batch_size, self.kv_heads * self.group, self.head_dim))
        store = self.key_history.store
        counters.reserve(query, self.kv_heads, store.bitmap.shape[2], self.key_history.window.shape[2])

    @property
    def leads(self) -> bool:
        return self.counters.leader == self.layer_idx

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens [B, Hkv, T, D]; returns what attention works on, as `MustafarLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"the static cache has room for a batch of {self.batch_size}, got tokens for a batch of "
                f"{key_states.shape[0]}: make a cache for each batch size"
            )
        if key_states.shape[2] != 1 or not self.filled:
            return self._update_long(key_states, value_states)
        keys, values, counters = self.key_history, self.value_history, self.counters
        if counters.leader == self.layer_idx:
            ops.window_advance(
                counters.state,
                counters.lengths,
                counters.total,
                self.settings.residual_length,
                self.settings.flush_every,
                self.max_length,
            )
        ops.window_append(
            key_states,
            value_states,
            keys.store,
            values.store,
            keys.window,
            values.window,
            counters.state,
            keys.kept,
            values.kept,
        )
        handle = CompressedKV(self)
        return handle, handle

    def _update_long(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Any, Any]:
        """A first turn, or a turn of several tokens."""
        new = (key_states, value_states)
        if self.settings.check:
            for name, states in (("keys", key_states), ("values", value_states)):
                raise_on_nan(states, name, self.layer_idx, 0)
        if self.leads:
            self.counters.before = self.counters.read() if self.filled else (0, 0, 0)
        packed, window, pruned = self.counters.before
        added, held = key_states.shape[2], packed + window
        if held + added > self.max_length:
            raise ValueError(
                f"max_length: the static cache has room for {self.max_length} tokens, and {held} + {added} are "
                "needed: make it with a larger max_length"
            )
        residual, flush_every = self.settings.residual_length, self.settings.flush_every
        histories = (self.key_history, self.value_history)
        result: Any = new
        if held == 0:
            tails = new
            target = max(0, added - residual)
        else:
            target = pruned
            if held - pruned >= residual + flush_every:
                target = held - residual
                now_packed, _ = (h.settle(h.window[:, :, :window], packed, target) for h in histories)
                packed, window = now_packed, held - now_packed
            tails = tuple(
                torch.cat([h.window[:, :, :window], states], dim=2)
                for h, states in zip(histories, new, strict=True)
            )
            at_once = added > flush_every or window + added > self.key_history.window.shape[2]
            if not at_once and added <= MOST_QUERIES:
                result = (CompressedKV(self),) * 2
            else:
                result = tuple(h.dense(packed, tail) for h, tail in zip(histories, tails, strict=True))
            if at_once:
                target = held + added - residual
        for history, tail in zip(histories, tails, strict=True):
            now_packed = history.settle(tail, packed, target)
        self.filled = True
        self.mask_checked = False
        self.turn = (now_packed, held + added - now_packed)
        if self.leads:
            self.counters.put(*self.turn, target)
        return result

    def attend(
        self, query: torch.Tensor, starts: torch.Tensor | None, scaling: float | None, sliding_window: int
    ) -> torch.Tensor:
        """Decode attention of query [B, H, D] over all tokens held."""
        return ops.decode_attention(
            query,
            self.key_history.store,
            self.value_history.store,
            self.key_history.window,
            self.value_history.window,
            self.counters.lengths,
            starts,
            scaling,
            sliding_window,
            self.counters.workspace,
        )

    def attend_rows(
        self, query: torch.Tensor, starts: torch.Tensor | None, scaling: float | None, sliding_window: int
    ) -> torch.Tensor:
        """The same for query [B, H, n, D] of the turn just added: [B, n, H, D]."""
        keys, values, (packed, window) = self.key_history, self.value_history, self.turn
        return attend_rows(
            query,
            keys.held(packed),
            values.held(packed),
            keys.window,
            values.window,
            packed,
            window,
            starts,
            scaling,
            sliding_window,
        )

    def held_tokens(self) -> tuple[int, int]:
        """Compressed and window tokens after the turn just added."""
        return self.turn

    def dense(self) -> tuple[torch.Tensor, ...]:
        """All keys and all values of the turn just added, decompressed."""
        packed, window = self.turn
        return tuple(h.dense(packed, h.window[:, :, :window]) for h in (self.key_history, self.value_history))

    def get_seq_length(self, *args: Any) -> int | torch.Tensor:
        """Tokens held, once there are some a tensor on the device that later steps change."""
        return self.counters.total if self.is_initialized and self.filled else 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that `update` with so many queries leaves to attend to."""
        if isinstance(query_length, torch.Tensor) and query_length.dim() > 0:
            query_length = query_length.shape[0]  # before transformers 5.4: the positions of the queries
        if not self.filled:
            return int(query_length), 0
        if query_length == 1:
            return self.max_length, 0
        return int(self.counters.total) + int(query_length), 0

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def nbytes(self) -> list[dict[str, int]]:
        if not self.is_initialized:
            return []
        packed, window, _ = self.counters.read()
        return [history.nbytes(packed, window) for history in (self.key_history, self.value_history)]

    def reset(self) -> None:
        """Forget the tokens and keep the memory, for the next prompt."""
        self.filled = self.mask_checked = False
        if self.is_initialized and self.leads:
            self.counters.put(0, 0, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each batch row continue from another one (beam search)."""
        if self.is_initialized:
            index = beam_idx.to(self.device)
            for history in (self.key_history, self.value_history):
                for buffer in history.buffers():
                    buffer.copy_(buffer.index_select(0, index))

    def crop(self, amount: int | torch.Tensor) -> None:
        if int(amount) != 0:
            _refuse("cropping (assisted decoding, restoring a cache)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1 and self.is_initialized:
            _refuse("another batch size")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            _refuse("another batch size")

    def offload(self) -> NoReturn:
        raise NotImplementedError("a Mustafar cache stays on its device: offloading is not supported")

    prefetch = offload


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} takes a dynamic cache: MustafarCache(..., static=False)")
