"""The command line of a prediction run, and the configuration that names its folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import UserError
from .prompts import CHAT_TEMPLATES

MODES = ("dense", "mustafar", "mustafar-mistral")
BACKENDS = ("kernel", "simulate")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULTS = {"k_rule": "Kt_Mag", "v_rule": "Vt_Mag", "backend": "kernel", "residual_length": 32}
#: Runs write to `<this>/pred` and `<this>/pred_e` unless --output_dir says otherwise.
OUTPUT_DIR = Path(__file__).resolve().parents[2]

_EXAMPLES = """examples:
  bash long_test.sh 0.7 0.7 meta-llama/Meta-Llama-3-8B-Instruct mustafar
  bash long_test.sh 0 0 mistralai/Mistral-7B-Instruct-v0.2 dense --datasets en
  bash long_test.sh 0.5 0.5 ./my_llama mustafar --data_dir ./my_rows --datasets trec qasper --limit 10
Data comes from --data_dir, else accuracy_eval/data, else THUDM/LongBench on the hub. A run that was
interrupted is resumed by the same command. Score with: python eval_long_bench.py --model FOLDER"""


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be the fraction of zeros, in [0, 1), got {text!r}")
    return value


def _at_least(smallest: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}, got {text!r}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    """Return the parser of `long_test.sh` and `pred_long_bench.py`."""
    main = argparse.ArgumentParser(
        prog="long_test.sh",
        usage="bash long_test.sh k_sparsity v_sparsity model mode [options]      (--help lists them)",
        description="Predict LongBench with a dense or a Mustafar-pruned KV cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    main.add_argument("k_sparsity", type=_sparsity, help="fraction of zeros in the pruned keys, in [0, 1)")
    main.add_argument("v_sparsity", type=_sparsity, help="fraction of zeros in the pruned values, in [0, 1)")
    main.add_argument("model", help="a local folder or a hub id")
    main.add_argument(
        "mode",
        choices=MODES,
        help="dense: transformers' own cache. mustafar: pruned, for Llama and (through the generic path) for "
        "other decoder-only models. mustafar-mistral: pruned, for Mistral",
    )
    main.add_argument("--k_rule", default=DEFAULTS["k_rule"], help="pruning rule of the keys (%(default)s)")
    main.add_argument("--v_rule", default=DEFAULTS["v_rule"], help="pruning rule of the values (%(default)s)")
    main.add_argument(
        "--backend",
        choices=BACKENDS,
        default=DEFAULTS["backend"],
        help="kernel: attention on the compressed cache. simulate: on a dense copy with the same zeros (%(default)s)",
    )
    main.add_argument(
        "--group_size",
        type=_at_least(1),
        default=32,
        help="tokens ranked together by channel-wise rules; Kt_Mag and Vt_Mag do not use it (32)",
    )
    main.add_argument(
        "--residual_length",
        type=_at_least(0),
        default=DEFAULTS["residual_length"],
        help="dense window of the newest tokens (32)",
    )
    main.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help="data sets, or all, en (the paper's 16), zh; default: those of DATA_DIR/tasks.json, else all",
    )
    main.add_argument("--data_dir", type=Path, help="folder with <data set>.jsonl or data/<data set>.jsonl")
    main.add_argument("--e", action="store_true", help="LongBench-E: the 13 sets of even lengths, to pred_e/")
    main.add_argument("--limit", type=_at_least(1), help="only the first LIMIT rows of each data set")
    main.add_argument("--max_length", type=_at_least(2), help="prompt limit in tokens (by the model's name)")
    main.add_argument(
        "--chat_template", choices=CHAT_TEMPLATES, default="auto", help="%(default)s: as the paper"
    )
    main.add_argument("--batch_size", type=_at_least(1), default=1, help="rows per generate call (1)")
    main.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU")
    main.add_argument("--device", help="cuda, cuda:1, cpu or auto (spread over GPUs, needs accelerate)")
    main.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where pred/ or pred_e/ is made")
    return main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check what can be checked without loading anything.

    Raises
    ------
    UserError
        If options contradict each other or a rule is unknown.
    """
    args = parser().parse_args(argv)
    if args.datasets:
        args.datasets = [name for text in args.datasets for name in text.split(",") if name]
    if args.mode == "dense" and (args.k_sparsity or args.v_sparsity):
        raise UserError(
            f"mode dense prunes nothing, but the sparsities are {args.k_sparsity} and {args.v_sparsity}; "
            "give 0 0, or one of the modes mustafar, mustafar-mistral"
        )
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir} is not a folder")
    _check_rules(args)
    return args


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

    Two runs may share a folder only if all of this is equal. What a dense run does not use is None.
    """

    benchmark: str
    model: str
    model_fingerprint: str | None
    max_length: int
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
    name = (
        f"{model_name}_{settings.max_length}_K_{settings.k_sparsity}_V_{settings.v_sparsity}"
        f"_group{settings.group_size}"
    )
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
