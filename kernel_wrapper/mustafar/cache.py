"""`MustafarCache`: a transformers cache whose older tokens are pruned and compressed."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from mustafar import attention
from mustafar.counters import Counters
from mustafar.format import MAX_HEAD_DIM, SLICE_TOKENS
from mustafar.layer import Lengths, MustafarLayer
from mustafar.parallel import check_tensor_parallel, tensor_parallel_ranks
from mustafar.pruning import RULES, Pruning, get_rule
from mustafar.settings import BackendChoice, CacheSettings
from mustafar.static import StaticMustafarLayer
from mustafar.static_dense import DenseState, StaticDenseLayer, prune_when_due

BACKENDS = ("kernel", "simulate", "auto")
STATIC_LAYERS = (StaticMustafarLayer, StaticDenseLayer)


class MustafarCache(Cache):
    """Pass it to `generate` or `forward` as `past_key_values`::

        cache = MustafarCache(model.config, k_sparsity=0.7, v_sparsity=0.7)
        model.generate(**inputs, past_key_values=cache)

    Right after a prefill every token older than the last `residual_length` is pruned (paper section 3), and
    again whenever `flush_every` more tokens have gathered, so that the dense window holds `residual_length`
    to `residual_length + flush_every` tokens. Tokens are packed in slices of 64; up to 63 pruned tokens that
    do not fill a slice yet wait in the window, with their zeros. Padding is pruned and packed as any token
    is, and masked.

    A prompt's keys and values are dense for one layer at a time: each layer packs them as it gets them. A
    later turn of up to 16 tokens (also candidates of assisted decoding) attends to the compressed cache; a
    longer one attends densely to the decompressed cache, layer by layer. If it is longer than `flush_every` it
    is pruned at once, else with the tokens decoded next. The same holds for the chunks of a chunked prefill
    (`prefill_chunk_size` of `generate`), which therefore attend to pruned tokens of earlier chunks;
    `mustafar.prefill.mlp_in_pieces` bounds activations without that.

    Parameters
    ----------
    config : PreTrainedConfig
        `model.config`. With the kernel backend its attention implementation becomes "mustafar", which is what
        makes the model decode on the compressed form. The model still computes dense caches as before, by
        sdpa or FlashAttention 2; `model.set_attn_implementation(...)` sets another one for good.
    k_sparsity, v_sparsity : float
        Fraction of zeros in pruned keys and values, 0 <= sparsity < 1.
    k_rule, v_rule : str
        Pruning rules, from `mustafar.pruning.RULES`, any with any: Kt_Mag, Kt_Opt, ThinK for keys; Vt_Mag,
        Vt_Opt, Vc_Mag, Vc_Opt, ThinV for values. ``RULES[name].observes`` says whether one scores by the last
        32 queries: a prompt is then pruned right after its attention, later tokens as ever, and the simulated
        cache makes the model's attention "mustafar" too, as queries reach it only there.
    group_size : int
        Tokens ranked together by rules that rank tokens (Vc_Mag, Vc_Opt). Groups count from the first token
        pruned in one go; the last may be shorter and keeps the same fraction.
    residual_length : int
        The most recent tokens that stay dense.
    flush_every : int
        Tokens that gather beyond them before they are pruned.
    backend : {"kernel", "simulate", "auto"}
        "simulate" prunes the same values at the same times and returns dense tensors: it saves no memory and
        works with any attention implementation, which it leaves as it is unless a rule observes queries.
        "auto" is for speed: the first prompt (its first chunk, if prefill is chunked) decides between the two
        for all layers, by what was measured on its GPU (`mustafar.crossover`); `cache.backend` says which. A
        static one is decided by `mustafar.Decoder`, which captures and times a step of each at its first prompt
        (`mustafar.choosing`), for all prompts that follow; elsewhere it is "kernel".
    static : bool
        Take the memory for `max_length` tokens at once, and decode without the host: a step can then be
        captured in a CUDA graph, by `generate`, which compiles it, or by `mustafar.decoding`. Same tokens.
        Backend "kernel" or "auto", Kt_Mag and Vt_Mag or Vt_Opt, models whose layers are all of one kind; greedy
        search, sampling and beam search, one batch size. `reset()` makes it ready for the next prompt.
    max_length : int, optional
        Of a static cache: tokens of prompt and answer together.
    offloading : bool
        Not supported, must be False.

    Notes
    -----
    Environment ``MUSTAFAR_CHECK=1`` raises on NaN in keys or values, naming layer and position, and verifies
    every mask. Without it NaN is kept as the largest magnitude and reaches the output as in dense attention.

    Layers that attend to a sliding window stay transformers' own where a model mixes them with full ones.
    Where all are sliding (Mistral), all tokens are kept, compressed, and those beyond the window are masked.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range, naming the valid ones, and a number of ranks that KV heads do not divide among.
    NotImplementedError
        For models whose attention decoding does not compute, and offloading.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        k_sparsity: float = 0.5,
        v_sparsity: float = 0.5,
        *,
        k_rule: str = "Kt_Mag",
        v_rule: str = "Vt_Mag",
        group_size: int = 32,
        residual_length: int = 32,
        flush_every: int = 256,
        backend: str = "kernel",
        static: bool = False,
        max_length: int | None = None,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise NotImplementedError("offloading: a Mustafar cache stays on its device, leave it False")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
        _check_count("residual_length", residual_length, 0)
        _check_count("flush_every", flush_every, 1)
        self.settings = CacheSettings(
            keys=Pruning(get_rule(k_rule, "K"), k_sparsity, group_size),
            values=Pruning(get_rule(v_rule, "V"), v_sparsity, group_size),
            residual_length=residual_length,
            flush_every=flush_every,
            backend=backend,
            check=os.environ.get("MUSTAFAR_CHECK", "0") not in ("", "0"),
        )
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected model.config, got {type(config).__name__}")
        check_tensor_parallel(config, tensor_parallel_ranks(config))
        config = config.get_text_config(decoder=True)
        dense = backend == "simulate" and not self.settings.observes
        _check_model(config, dense)
        self.max_length = _check_static(self.settings, max_length) if static else None
        if not static and max_length is not None:
            raise ValueError("max_length is for static=True: a dynamic cache grows as needed")
        heads = getattr(config, "num_attention_heads", 1)
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self.choice = BackendChoice(self.settings, group)
        super().__init__(layers=_make_layers(config, self.choice, self.max_length))
        if not dense:
            attention.register()
            config._attn_implementation = attention.NAME

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens that there is room for; -1 if it grows as needed."""
        return -1 if self.max_length is None else self.max_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that there is room for; -1 if it grows as needed."""
        return self.get_max_cache_shape()

    @property
    def backend(self) -> str:
        """ "kernel" or "simulate", the same for all layers; "auto" before the prompt that decides."""
        if self.is_static and self.layers[0].is_initialized and self.choice.made == "auto":
            return "kernel"  # nobody decided before the first tokens
        return self.choice.made

    @property
    def is_static(self) -> bool:
        return self.max_length is not None

    def expect_decoding(self) -> None:
        """Let an empty static cache take single tokens as decoded ones, not as prompts: for capturing a step
        before there is a prompt. `reset()` ends it."""
        for layer in self.layers:
            if not (isinstance(layer, STATIC_LAYERS) and layer.is_initialized):
                raise RuntimeError("expect_decoding is for a static cache that has seen a token")
            layer.filled = True
            if isinstance(layer, StaticDenseLayer):
                layer.state.capturing = True

    def settle(self, backend: str) -> None:
        """Decide for a static cache with backend="auto": "kernel" or "simulate". Its memory and tokens are gone."""
        if not self.is_static or self.settings.backend != "auto" or backend not in ("kernel", "simulate"):
            raise ValueError('settle is for MustafarCache(..., static=True, backend="auto")')
        self.choice.made = backend
        count, state, shared = len(self.layers), DenseState(), {}
        self.layers = []
        for index in range(count):
            self.layers.append(
                StaticDenseLayer(self.settings, index, self.max_length, state, count)
                if backend == "simulate"
                else StaticMustafarLayer(
                    self.settings, index, self.max_length, self.choice.group, shared, count
                )
            )

    def before_step(self) -> None:
        """To be called before every captured step: a dense static cache is pruned here, when it is time."""
        if self.is_static and isinstance(self.layers[0], StaticDenseLayer):
            prune_when_due(self.layers)

    def pretend(self, tokens: int) -> None:
        """Let a static cache that has its memory hold so many tokens of zeros, to time a step."""
        pruned = max(0, tokens - self.settings.residual_length)
        packed = pruned - pruned % SLICE_TOKENS
        for layer in self.layers:
            layer.filled = True
            if isinstance(layer, StaticDenseLayer) and layer.leads:
                layer.state.put(tokens, self.settings.residual_length)
            elif isinstance(layer, StaticMustafarLayer) and layer.leads:
                layer.counters.put(packed, tokens - packed, pruned)

    def memory(self) -> dict[str, int]:
        """Bytes held by the pruned layers, keys and values together.

        Returns
        -------
        dict
            `compressed_bytes` of packed tokens; `window_bytes` of dense ones; `dense_equivalent_bytes` that
            all of them would take in a dense cache; `allocated_bytes`, room to grow included. A simulated
            cache holds all of it dense.
        """
        names = ("compressed_bytes", "window_bytes", "dense_equivalent_bytes", "allocated_bytes")
        total = dict.fromkeys(names, 0)
        for layer in self.layers:
            for sizes in layer.nbytes() if isinstance(layer, (MustafarLayer, *STATIC_LAYERS)) else ():
                for name, size in sizes.items():
                    total[name] += size
        return total


def _make_layers(config: PreTrainedConfig, choice: BackendChoice, max_length: int | None) -> list[Any]:
    """transformers' own choice of layers, with those of full attention replaced."""
    settings = choice.settings
    layers = DynamicCache(config=config).layers
    types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    all_sliding = types == {"sliding_attention"} and getattr(config, "sliding_window", None) is not None
    replaced = (DynamicLayer, DynamicSlidingWindowLayer) if all_sliding else (DynamicLayer,)
    if max_length is not None:
        if not all(type(layer) in replaced for layer in layers):
            raise NotImplementedError(
                f"static=True: model type {config.model_type!r} mixes layers of several kinds, which takes a "
                "dynamic cache"
            )
        shared: dict[torch.device, Counters] = {}
        return [
            StaticMustafarLayer(settings, index, max_length, choice.group, shared, len(layers))
            for index in range(len(layers))
        ]
    lengths = Lengths()
    layers = [
        MustafarLayer(settings, index, lengths, choice) if type(layer) in replaced else layer
        for index, layer in enumerate(layers)
    ]
    if not any(isinstance(layer, MustafarLayer) for layer in layers):
        found = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise NotImplementedError(
            f"model type {config.model_type!r} has no layer of full attention to prune, only {found}"
        )
    return layers


def _check_static(settings: CacheSettings, max_length: int | None) -> int:
    if settings.backend == "simulate":
        raise ValueError(
            'static=True is for backend="kernel" or "auto", got "simulate": a simulated cache is dense and grows'
        )
    for rule in (settings.keys.rule, settings.values.rule):
        if not rule.fused:
            names = [name for name, other in RULES.items() if other.fused]
            raise NotImplementedError(
                f"static=True: rule {rule.name} needs the host to prune; those that do not: {', '.join(names)}"
            )
    if max_length is None:
        raise ValueError("static=True needs max_length, the tokens of prompt and answer together")
    _check_count("max_length", max_length, 1)
    return max_length


def _check_model(config: PreTrainedConfig, any_attention: bool) -> None:
    """Refuse early what the attention function would refuse at the first token."""
    model = f"model type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{model} is an encoder-decoder; only decoders are supported")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and getattr(config, "num_attention_heads", None):
        head_dim = config.hidden_size // config.num_attention_heads
    if isinstance(head_dim, int) and head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"{model} has head_dim {head_dim}; at most {MAX_HEAD_DIM} is supported")
    if not any_attention and getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(
            f"{model} soft-caps its attention scores (attn_logit_softcapping), which decoding on the "
            'compressed cache does not compute: use backend="simulate" with attn_implementation="eager", '
            "and rules that observe no queries (Kt_Mag, Vt_Mag)"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} is a number of tokens and must be an int of at least {least}, got {value!r}"
        )
