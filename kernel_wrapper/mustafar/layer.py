"""`MustafarLayer`: the cache of one attention layer, and the handle that stands for it during decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from mustafar import ops
from mustafar.format import DTYPES, MAX_HEAD_DIM
from mustafar.history import DenseHistory, History, PackedHistory
from mustafar.multi_query import MOST_QUERIES, attend_rows
from mustafar.observer import Observer
from mustafar.settings import BackendChoice, CacheSettings


class Lengths:
    """The `lengths` argument of decode attention, made once per step for all layers on a device."""

    def __init__(self) -> None:
        self._made: dict[torch.device, tuple[tuple[int, int, int], torch.Tensor]] = {}

    def get(self, batch: int, packed: int, window: int, device: torch.device) -> torch.Tensor:
        """int32 [B, 2] of (compressed tokens, window tokens)."""
        wanted = (batch, packed, window)
        made = self._made.get(device)
        if made is None or made[0] != wanted:
            lengths = torch.empty((batch, 2), dtype=torch.int32, device=device)
            lengths[:, 0].fill_(packed)  # filled on the device: a copy from the host could wait for it
            lengths[:, 1].fill_(window)
            made = self._made[device] = (wanted, lengths)
        return made[1]


class MustafarLayer(CacheLayerMixin):
    """Keys and values of one layer, pruned and compressed beyond a local window.

    `update` with many tokens (prefill, longer later turns) returns dense tensors; with one token on a filled
    layer, or a few (short turns, candidates of assisted decoding), it returns a `CompressedKV` handle twice,
    for the "mustafar" attention function.

    Pruning happens right after the first prefill, down to `residual_length` dense tokens, and then whenever
    `flush_every` more have gathered. The latter is done at the start of the next `update`, so that what the
    caller appended last can still be cropped away untouched.

    Rules that score by recent queries need attention first: `update` then only adds tokens, and `observe`,
    which the "mustafar" attention function calls after it, remembers the queries and prunes a prompt.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, settings: CacheSettings, layer_idx: int, lengths: Lengths, choice: BackendChoice
    ) -> None:
        super().__init__()
        self.settings = settings
        self.layer_idx = layer_idx
        self.lengths = lengths
        self.choice = choice
        self.mask_checked = False
        self.key_history: History | None = None
        self.value_history: History | None = None
        self.observer = Observer()
        self.unobserved = False  # tokens were added whose queries have not come
        self.prune_when_observed = False

    def __repr__(self) -> str:
        return f"MustafarLayer(tokens={self.get_seq_length()})"

    @property
    def histories(self) -> tuple[History, ...]:
        return (self.key_history, self.value_history) if self.is_initialized else ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Take heads, head dim, dtype and device from the first tokens: a parallel rank has its own heads."""
        value_states = key_states if value_states is None else value_states
        self.simulate = self.choice.make(key_states) == "simulate"
        check_states(key_states, value_states, self.layer_idx, self.simulate)
        self.dtype, self.device = key_states.dtype, key_states.device
        kind = DenseHistory if self.simulate else PackedHistory
        capacity = self.settings.window_capacity
        self.key_history = kind(self.settings.keys, key_states, capacity)
        self.value_history = kind(self.settings.values, value_states, capacity)
        self.batch, self.kv_heads = key_states.shape[:2]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens [B, Hkv, T, D]; returns what attention works on, as the class describes."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch:
            raise ValueError(
                f"the cache holds a batch of {self.batch}, got tokens for a batch of {key_states.shape[0]}: "
                "call reset() on it, or make a new one for each batch"
            )
        if self.settings.check:
            for name, states in (("keys", key_states), ("values", value_states)):
                raise_on_nan(states, name, self.layer_idx, self.get_seq_length())
        if self.settings.observes:
            return self._update_observing(key_states, value_states)
        new = (key_states, value_states)
        added, held = key_states.shape[2], self.get_seq_length()
        residual, flush_every = self.settings.residual_length, self.settings.flush_every

        if held == 0:
            for history, states in zip(self.histories, new, strict=True):
                history.prune(max(0, added - residual), behind=states)
            self.mask_checked = False
            return new
        if self.key_history.unpruned >= residual + flush_every:
            for history in self.histories:
                history.prune(held - residual)
        if added > flush_every:
            # A long turn is pruned at once, or it would stay dense in all layers until the next step.
            full = tuple(torch.cat([h.dense(), s], dim=2) for h, s in zip(self.histories, new, strict=True))
            for history, states in zip(self.histories, new, strict=True):
                history.prune(held + added - residual, behind=states)
            self.mask_checked = False
            return full
        for history, states in zip(self.histories, new, strict=True):
            history.append(states)
        if added <= MOST_QUERIES and not self.simulate:
            handle = CompressedKV(self)
            return handle, handle
        self.mask_checked = False
        return self.dense()

    def _update_observing(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Any, Any]:
        """`update` for rules that score by recent queries: prunes at the same times, but a prompt or long
        turn only when its queries are known."""
        if self.unobserved:
            rules = [p.rule.name for p in (self.settings.keys, self.settings.values) if p.rule.observes]
            raise RuntimeError(
                f"layer {self.layer_idx}: {' and '.join(rules)} score by recent queries, and no attention "
                'function has passed any: attn_implementation must be "mustafar", also to simulate. Call '
                'model.set_attn_implementation("mustafar"); a model with attention code of its own can only '
                "use rules that observe no queries, such as Kt_Mag and Vt_Mag"
            )
        added, held = key_states.shape[2], self.get_seq_length()
        residual, flush_every = self.settings.residual_length, self.settings.flush_every
        # After a crop there may be no query left to score by; the next flush makes up for it.
        if self.key_history.unpruned >= residual + flush_every and held and self.observer.seen:
            self._prune_observed(held - residual)
        for history, states in zip(self.histories, (key_states, value_states), strict=True):
            history.append(states)
        self.unobserved = True
        self.prune_when_observed = held == 0 or added > flush_every
        if added <= min(MOST_QUERIES, flush_every) and held and not self.simulate:
            handle = CompressedKV(self)
            return handle, handle
        self.mask_checked = False
        keys, values = self.dense() if held else (key_states, value_states)
        keys._mustafar_layer = self  # how the attention function finds the layer to show queries to
        return keys, values

    def observe(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
    ) -> None:
        """Take note of query [B, H, T, D], that of the tokens added last, where a rule scores by it."""
        if not self.settings.observes:
            return
        self.observer.add(query, mask, scaling, sliding_window)
        self.unobserved = False
        if self.prune_when_observed:
            self._prune_observed(self.get_seq_length() - self.settings.residual_length)

    def _prune_observed(self, pruned: int) -> None:
        """Prune the oldest `pruned` tokens; values first, as their score may take the keys attended to."""
        keys, values = self.histories
        if pruned <= keys.pruned:
            return
        window = self.observer.observed(
            keys.dense, self.kv_heads, keys.tokens, first=keys.pruned, last=pruned
        )
        values.prune(pruned, window=window)
        keys.prune(pruned, window=window)

    def attend(
        self, query: torch.Tensor, starts: torch.Tensor | None, scaling: float | None, sliding_window: int
    ) -> torch.Tensor:
        """Decode attention of query [B, H, D] over all tokens held; `mustafar.ops.decode_attention` says the
        rest."""
        keys, values = self.histories
        lengths = self.lengths.get(self.batch, keys.packed_tokens, keys.window_tokens, self.device)
        return ops.decode_attention(
            query,
            keys.packed(),
            values.packed(),
            keys.window,
            values.window,
            lengths,
            starts,
            scaling,
            sliding_window,
        )

    def attend_rows(
        self, query: torch.Tensor, starts: torch.Tensor | None, scaling: float | None, sliding_window: int
    ) -> torch.Tensor:
        """The same for query [B, H, n, D] of the last n tokens: [B, n, H, D]."""
        keys, values = self.histories
        return attend_rows(
            query,
            keys.packed(),
            values.packed(),
            keys.window,
            values.window,
            keys.packed_tokens,
            keys.window_tokens,
            starts,
            scaling,
            sliding_window,
        )

    def held_tokens(self) -> tuple[int, int]:
        """Compressed and window tokens."""
        return self.key_history.packed_tokens, self.key_history.window_tokens

    def dense(self) -> tuple[torch.Tensor, ...]:
        """All keys and all values, decompressed."""
        return tuple(history.dense() for history in self.histories)

    def get_seq_length(self, *args: Any) -> int:
        return self.key_history.tokens if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that `update` with so many queries leaves to attend to."""
        if isinstance(query_length, torch.Tensor) and query_length.dim() > 0:
            query_length = query_length.shape[0]  # before transformers 5.4: the positions of the queries
        return self.get_seq_length() + int(query_length), 0

    def nbytes(self) -> list[dict[str, int]]:
        """`History.nbytes` of keys and values; nothing before the first token."""
        return [history.nbytes() for history in self.histories]

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def reset(self) -> None:
        self.key_history = self.value_history = None
        self.is_initialized = self.mask_checked = False
        self.choice.forget()
        self.observer = Observer()
        self.unobserved = self.prune_when_observed = False

    def crop(self, amount: int | torch.Tensor) -> None:
        """Remove the last `-amount` tokens; a positive `amount` is the length to keep (transformers before
        5.14)."""
        amount = int(amount)
        held = self.get_seq_length()
        tokens = amount if amount > 0 else max(0, held + amount)
        if tokens >= held:
            return
        if tokens == 0:
            return self.reset()
        for history in self.histories:
            history.crop(tokens)
        self.observer.crop(held - tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each batch row continue from another one (beam search)."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for history in self.histories:
            history.select(rows)
        self.observer.select(rows)
        if self.is_initialized:
            self.batch = rows(torch.empty(self.batch, 0, device=self.device)).shape[0]

    def offload(self) -> NoReturn:
        raise NotImplementedError("a Mustafar cache stays on its device: offloading is not supported")

    prefetch = offload


class CompressedKV:
    """Stands for the keys and values of a layer between its `update` and the "mustafar" attention function.

    Anything else that touches it gets an error instead of wrong numbers.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer  # a MustafarLayer or a StaticMustafarLayer

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse_use(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols of copy, pickle and the like ask for what may be absent
        _refuse_use(name)

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse_use("indexing")


def _refuse_use(what: str) -> NoReturn:
    raise RuntimeError(
        f"attention used the compressed keys and values as tensors ({what}): "
        'attn_implementation must be "mustafar" to decode on them. Call '
        'model.set_attn_implementation("mustafar"); where the model has attention code of its own, which ignores '
        'that, use backend="simulate": it works with any attention'
    )


def check_states(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, simulate: bool) -> None:
    """Refuse what the format or the kernels do not support, naming the layer."""
    where = f"layer {layer_idx}"
    if keys.dim() != 4 or keys.shape != values.shape:
        raise NotImplementedError(
            f"{where}: keys and values must both be [batch, kv_heads, tokens, head_dim], "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not 0 < keys.shape[3] <= MAX_HEAD_DIM:
        raise NotImplementedError(f"{where}: head_dim must be 1 to {MAX_HEAD_DIM}, got {keys.shape[3]}")
    supported = DTYPES if simulate or keys.device.type == "cpu" else (torch.float16, torch.bfloat16)
    if keys.dtype not in supported or keys.dtype != values.dtype:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        raise TypeError(
            f"{where}: keys and values on {keys.device.type} must have one dtype of {names}, "
            f"got {keys.dtype} and {values.dtype}: load the model with dtype=torch.float16 or torch.bfloat16"
        )


def raise_on_nan(states: torch.Tensor, name: str, layer_idx: int, first: int) -> None:
    """MUSTAFAR_CHECK=1: name where a NaN entered."""
    found = states.isnan()
    if found.any():
        batch, head, token, channel = found.nonzero()[0].tolist()
        raise RuntimeError(
            f"NaN in the {name} of layer {layer_idx} at position {first + token} "
            f"(batch {batch}, KV head {head}, channel {channel})"
        )
