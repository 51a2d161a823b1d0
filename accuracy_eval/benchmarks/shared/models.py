"""Loading a model for a mode: dense, or with a Mustafar cache."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .options import DTYPES, Settings

# Which mode runs an architecture. Any other decoder-only model: mode mustafar, through the generic path.
_MODE_OF = {"llama": "mustafar", "mistral": "mustafar-mistral"}
_WEIGHTS = (".safetensors", ".bin")
_SMALL_FILES = (".json", ".model", ".txt", ".jinja")


@dataclass
class ModelInfo:
    """What is known of a model before its weights are loaded."""

    name: str
    path: str
    config: object
    tokenizer: object
    fingerprint: str | None


@dataclass
class LoadedModel:
    """A model ready to generate. `make_cache` makes the pruned cache of one call; None: the cache is dense."""

    model: object
    tokenizer: object
    make_cache: Callable[[], object] | None


def looks_like_path(model: str) -> bool:
    """Whether it cannot be a hub id."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def inspect_model(model: str) -> ModelInfo:
    """Read a model's config and tokenizer from a local folder or the hub.

    Raises
    ------
    UserError
        If there is no such model or it cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(model).expanduser()
    local = folder.is_dir()
    if local:
        folder = folder.resolve()
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a model: it has no config.json")
    elif looks_like_path(model):
        raise UserError(f"no such folder: {model} (a model is a local folder or a hub id such as owner/name)")
    path = str(folder) if local else model
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        hint = (
            "" if local else "\nWithout a network give the folder of a downloaded copy instead of a hub id."
        )
        if "custom code" in str(error):
            hint = "\nA checkpoint's own code is never run here; it may do anything. Use a model that needs none."
        raise UserError(f"cannot read the model {model}: {_first_lines(error)}{hint}") from None
    fingerprint = _fingerprint(folder) if local else getattr(config, "_commit_hash", None)
    return ModelInfo(Path(path).name, path, config, tokenizer, fingerprint)


def _fingerprint(folder: Path) -> str:
    """Digest of a local model: its small files whole, its weight files by size and 17 blocks.

    It tells a retrained model in the same folder from the one that an earlier run used.
    """
    digest = hashlib.sha256()
    block = 1 << 16
    for path in sorted(folder.iterdir()):
        if path.suffix in _SMALL_FILES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}".encode())
            with path.open("rb") as file:
                for part in range(17):
                    file.seek(max(0, size - block) * part // 16)
                    digest.update(file.read(block))
    return digest.hexdigest()


def position_limit(info: ModelInfo) -> int | None:
    """Return how many tokens, prompt and answer, the model was made for; None if its config is silent."""
    return getattr(info.config.get_text_config(), "max_position_embeddings", None)


def resolve_device(given: str | None) -> str:
    """Return the device's name as given, else `cuda` if there is one, else `cpu`."""
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if given != "auto":
        try:
            device = torch.device(given)
        except RuntimeError:
            raise UserError(
                f"--device {given} is not a device; valid ones: cpu, cuda, cuda:<n>, auto"
            ) from None
        if device.type == "cuda" and (
            not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
        ):
            raise UserError(f"--device {given}: this torch sees {torch.cuda.device_count()} GPUs")
    return given


def resolve_dtype(info: ModelInfo, given: str | None, device: str) -> str:
    """Return the dtype's name: the option's, else float32 on a CPU and the checkpoint's half on a GPU.

    A checkpoint in float32 runs in float16 on a GPU, whose kernels take half precision only.
    """
    if given:
        return given
    if device == "cpu":
        return "float32"
    stored = str(getattr(info.config, "dtype", None) or "").removeprefix("torch.")
    return stored if stored in DTYPES and stored != "float32" else "float16"


def pruned_mode(info: ModelInfo) -> str:
    """Return the mode that runs a model with a pruned cache."""
    return _MODE_OF.get(info.config.model_type, "mustafar")


def check_mode(info: ModelInfo, mode: str) -> None:
    """Refuse a mode that is made for another architecture, naming the right one."""
    kind, right = info.config.model_type, pruned_mode(info)
    if mode != "dense" and mode != right:
        raise UserError(
            f"mode {mode} is not for {info.name}, a model of type {kind}; use mode {right} (or dense)"
        )


def check_kernels(info: ModelInfo, settings: Settings) -> None:
    """Refuse what the GPU kernels do not take, before anything is loaded; the CPU's take any head dim and dtype.

    Raises
    ------
    UserError
        Naming what it is, and what to do about it.
    """
    if settings.mode == "dense" or settings.backend == "simulate" or settings.device == "cpu":
        return
    remedy = "give --backend simulate, or --device cpu"
    config = info.config.get_text_config()
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and getattr(config, "num_attention_heads", None):
        head_dim = config.hidden_size // config.num_attention_heads
    if isinstance(head_dim, int) and head_dim % 8:
        raise UserError(
            f"{info.name} has head_dim {head_dim}; the GPU kernels take multiples of 8 up to 256: {remedy}"
        )
    if settings.dtype == "float32":
        raise UserError(
            f"--dtype float32: the GPU kernels take float16 and bfloat16: leave it out, or {remedy}"
        )


def load_model(info: ModelInfo, settings: Settings, device: str) -> LoadedModel:
    """Load the weights for the settings' mode and dtype, onto `device` (as `resolve_device` returns it).

    Raises
    ------
    UserError
        If the model or its cache cannot be made, with the library's reason.
    """
    import torch

    options: dict = {"dtype": getattr(torch, settings.dtype)}
    if device == "auto":
        options["device_map"] = "auto"
    load = _load_dense if settings.mode == "dense" else _load_pruned
    try:
        loaded = load(info, settings, options)
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"cannot load {info.name} in mode {settings.mode}: {_first_lines(error)}") from error
    if device != "auto":
        loaded.model.to(device)
    loaded.model.eval()
    return loaded


def _load_dense(info: ModelInfo, settings: Settings, options: dict) -> LoadedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    flash = settings.device != "cpu" and settings.dtype != "float32" and is_flash_attn_2_available()
    # None: sdpa, or what a model without it computes attention by.
    attention = "flash_attention_2" if flash else None
    return LoadedModel(
        _read_weights(AutoModelForCausalLM, info, attn_implementation=attention, **options),
        info.tokenizer,
        None,
    )


def _load_pruned(info: ModelInfo, settings: Settings, options: dict) -> LoadedModel:
    import mustafar
    from transformers import AutoModelForCausalLM

    pruning = {
        "k_sparsity": settings.k_sparsity,
        "v_sparsity": settings.v_sparsity,
        "k_rule": settings.k_rule,
        "v_rule": settings.v_rule,
        "group_size": settings.group_size,
        "residual_length": settings.residual_length,
        "backend": settings.backend,
    }
    kind = info.config.model_type
    if kind in _MODE_OF:
        if kind == "llama":
            from model.llama import MustafarLlamaForCausalLM as PrunedModel
        else:
            from model.mistral import MustafarMistralForCausalLM as PrunedModel
        model = _read_weights(PrunedModel, info, **pruning, **options)
        return LoadedModel(model, info.tokenizer, model.new_cache)
    # A model it cannot serve is refused before it is loaded; with a copy, because the cache changes the config.
    mustafar.MustafarCache(copy.deepcopy(info.config), **pruning)
    mustafar.register()
    attention = None if settings.backend == "simulate" else "mustafar"
    model = _read_weights(AutoModelForCausalLM, info, attn_implementation=attention, **options)
    return LoadedModel(model, info.tokenizer, lambda: mustafar.MustafarCache(model.config, **pruning))


def _read_weights(model_class, info: ModelInfo, **options):
    """Load a model; transformers would fill weights that the checkpoint lacks with random numbers."""
    from safetensors import SafetensorError

    try:
        model, found = model_class.from_pretrained(
            info.path, output_loading_info=True, trust_remote_code=False, **options
        )
    except SafetensorError as error:
        raise OSError(f"a weight file is damaged ({error}); download the checkpoint again") from None
    except pickle.UnpicklingError:
        raise OSError(
            "a .bin weight file is damaged or holds more than tensors, which could run code; use a checkpoint of "
            "safetensors files"
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise OSError(
            f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}; it is damaged or of another "
            "architecture than its config.json says"
        )
    return model


def _first_lines(error: BaseException) -> str:
    """Return a library's message without its tail of links and hints."""
    return "\n".join(str(error).strip().splitlines()[:3]) or type(error).__name__
