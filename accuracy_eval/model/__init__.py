"""Models that decode on a pruned, compressed KV cache by themselves: a mixin, and a thin class for each.

To add an architecture, copy llama.py and change its two names. Nothing of the model is copied: the mixin
makes the cache, and the cache brings the attention.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mustafar.attention import NAME, register
from mustafar.cache import MustafarCache
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig

_PRUNING = ("k_sparsity", "v_sparsity", *MustafarCache.__init__.__kwdefaults__)
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class MustafarModel(GenerationMixin):
    """Gives a causal language model `from_pretrained` with pruning arguments, and the cache in `generate`.

    The arguments, all optional, are those of `mustafar.MustafarCache`: `k_sparsity`, `v_sparsity`, `k_rule`,
    `v_rule`, `group_size`, `residual_length`, `flush_every`, `backend`.
    """

    pruning: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> MustafarModel:
        """Load a checkpoint, pruning its cache as the arguments say.

        Raises
        ------
        ValueError
            If the checkpoint is of another architecture, or a pruning argument is out of range; before any
            weight is loaded.
        NotImplementedError
            If the model's attention is not supported.
        """
        pruning = {name: kwargs.pop(name) for name in _PRUNING if name in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            where = {name: kwargs[name] for name in _WHERE if name in kwargs}
            config = AutoConfig.from_pretrained(config or pretrained_model_name_or_path, **where)
        expected = cls.config_class.model_type
        if config.model_type != expected:
            raise ValueError(
                f"{cls.__name__} loads checkpoints of type {expected!r}, {pretrained_model_name_or_path} is of "
                f"type {config.model_type!r}: load it with AutoModelForCausalLM and pass "
                "past_key_values=mustafar.MustafarCache(model.config, ...) to generate()"
            )
        MustafarCache(copy.deepcopy(config), **pruning)  # fails here where it would fail in generate()
        if pruning.get("backend", "kernel") != "simulate":
            register()
            asked = kwargs.setdefault("attn_implementation", NAME)
            if asked != NAME:
                raise ValueError(
                    f"attn_implementation={asked!r}: decoding on the compressed cache needs {NAME!r}; leave it "
                    'out, or use backend="simulate"'
                )
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.pruning = pruning
        return loaded

    def new_cache(self) -> MustafarCache:
        """An empty cache with the model's pruning, as each `generate` without `past_key_values` makes one."""
        return MustafarCache(self.config, **self.pruning)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False: there is no cache to prune; leave it out, or load the dense model"
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model makes its own, "
                "pruned cache; leave it out"
            )
        model_kwargs["past_key_values"] = self.new_cache()
        return None
