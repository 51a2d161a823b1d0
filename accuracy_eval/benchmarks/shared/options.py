"""Options and settings that every benchmark's prediction run has."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .chat import CHAT_TEMPLATES
from .errors import UserError

MODES = ("dense", "mustafar", "mustafar-mistral")
BACKENDS = ("kernel", "simulate", "auto")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULTS = {"k_rule": "Kt_Mag", "v_rule": "Vt_Mag", "backend": "kernel", "residual_length": 32}
#: Runs write to a folder in this one unless --output_dir says otherwise.
OUTPUT_DIR = Path(__file__).resolve().parents[2]


def sparsity(text: str) -> float:
    """Parse a fraction of zeros in [0, 1), as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be the fraction of zeros, in [0, 1), got {text!r}")
    return value


def at_least(smallest: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least `smallest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}, got {text!r}")
        return value

    return parse


def add_model_options(main: argparse.ArgumentParser) -> None:
    """Add what says which model runs and how its cache is pruned: four positionals and their options."""
    main.add_argument("k_sparsity", type=sparsity, help="fraction of zeros in the pruned keys, in [0, 1)")
    main.add_argument("v_sparsity", type=sparsity, help="fraction of zeros in the pruned values, in [0, 1)")
    main.add_argument("model", help="a local folder or a hub id")
    main.add_argument(
        "mode",
        choices=MODES,
        help="dense: transformers' own cache. mustafar: pruned, for Llama and (through the generic path) for "
        "other decoder-only models. mustafar-mistral: pruned, for Mistral",
    )
    main.add_argument(
        "--k_rule",
        default=DEFAULTS["k_rule"],
        help="pruning rule of the keys: Kt_Mag, Kt_Opt, ThinK or one of yours (%(default)s)",
    )
    main.add_argument(
        "--v_rule",
        default=DEFAULTS["v_rule"],
        help="pruning rule of the values: Vt_Mag, Vt_Opt, Vc_Mag, Vc_Opt, ThinV or one of yours (%(default)s)",
    )
    main.add_argument(
        "--backend",
        choices=BACKENDS,
        default=DEFAULTS["backend"],
        help="kernel: attention on the compressed cache. simulate: on a dense copy with the same zeros. auto: the "
        "one measured to be faster on this GPU (%(default)s)",
    )
    main.add_argument(
        "--group_size",
        type=at_least(1),
        default=32,
        help="tokens ranked together by channel-wise rules, Vc_Mag and Vc_Opt; others do not use it (32)",
    )
    main.add_argument(
        "--residual_length",
        type=at_least(0),
        default=DEFAULTS["residual_length"],
        help="dense window of the newest tokens (32)",
    )


def add_run_options(main: argparse.ArgumentParser) -> None:
    """Add how prompts are wrapped and generated, and where the run goes."""
    main.add_argument(
        "--chat_template", choices=CHAT_TEMPLATES, default="auto", help="%(default)s: as the paper"
    )
    main.add_argument("--batch_size", type=at_least(1), default=1, help="rows per generate call (1)")
    main.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU")
    main.add_argument("--device", help="cuda, cuda:1, cpu or auto (spread over GPUs, needs accelerate)")
    main.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where the folder of runs is made")


def check(args: argparse.Namespace) -> None:
    """Check what can be checked without loading anything.

    Raises
    ------
    UserError
        If the mode contradicts the sparsities or a rule is unknown.
    """
    if args.mode == "dense" and (args.k_sparsity or args.v_sparsity):
        raise UserError(
            f"mode dense prunes nothing, but the sparsities are {args.k_sparsity} and {args.v_sparsity}; "
            "give 0 0, or one of the modes mustafar, mustafar-mistral"
        )
    _check_rules(args)


def _check_rules(args: argparse.Namespace) -> None:
    try:
        from mustafar.pruning import get_rule
    except ImportError as error:
        if args.mode == "dense":
            return
        raise UserError(
            f"the package mustafar is not usable: {error}\nInstall it with: make -C build (or: pip install -e "
            "kernel_wrapper)"
        ) from None
    try:
        get_rule(args.k_rule, "K")
        get_rule(args.v_rule, "V")
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's predictions, apart from its data.

    Two runs may share a folder only if all of this is equal. What a run does not use is None: pruning in a dense
    one, `max_length` (the prompt limit in tokens) in a benchmark whose rows have the length asked for.
    """

    benchmark: str
    model: str
    model_fingerprint: str | None
    max_length: int | None
    mode: str
    k_sparsity: float
    v_sparsity: float
    group_size: int
    k_rule: str | None
    v_rule: str | None
    residual_length: int | None
    backend: str | None
    chat_template: str
    dtype: str
    device: str
    batch_size: int

    def identity(self) -> dict:
        """Return the settings as the config.json holds and compares them."""
        return asdict(self)


def folder_name(settings: Settings, args: argparse.Namespace, model_name: str) -> str:
    """Return `<model>_<maxlen>_K_<k>_V_<v>_group<g>`, followed by what is not the default.

    Options that follow the model or the machine when they are left out (chat template, dtype) are named only
    where they were given; the config beside the predictions records what they came to.
    """
    name = model_name if settings.max_length is None else f"{model_name}_{settings.max_length}"
    name += f"_K_{settings.k_sparsity}_V_{settings.v_sparsity}_group{settings.group_size}"
    if settings.mode == "dense":
        name += "_dense"
    else:
        if (args.k_rule, args.v_rule) != (DEFAULTS["k_rule"], DEFAULTS["v_rule"]):
            name += f"_{args.k_rule}_{args.v_rule}"
        if args.residual_length != DEFAULTS["residual_length"]:
            name += f"_residual{args.residual_length}"
        if args.backend != DEFAULTS["backend"]:
            name += f"_{args.backend}"
    if args.chat_template != "auto":
        name += f"_chat-{args.chat_template}"
    if args.dtype:
        name += f"_{args.dtype}"
    if args.batch_size != 1:
        name += f"_batch{args.batch_size}"
    return name
