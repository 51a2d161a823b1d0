"""The command line of a RULER prediction run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..shared.errors import UserError
from ..shared.options import add_model_options, add_run_options, at_least, check
from .tasks import GROUPS, TASKS

_EXAMPLES = """examples:
  python pred_ruler.py 0 0 meta-llama/Llama-3.1-8B-Instruct dense --lengths 4k 32k
  python pred_ruler.py 0.7 0.7 meta-llama/Llama-3.1-8B-Instruct mustafar --tasks synthetic --rows 100
  python pred_ruler.py 0.5 0.5 ./my_llama mustafar --tasks niah vt --lengths 8k --essays essays.txt
  torchrun --nproc_per_node=4 pred_ruler.py 0.7 0.7 meta-llama/Llama-3.1-8B-Instruct mustafar
Rows are generated from the seed for the model's own tokenizer; qa_1 and qa_2 read SQuAD and HotpotQA from
--data_dir, else accuracy_eval/data/ruler. A run that was interrupted is resumed by the same command.
With torchrun processes share the rows, a GPU each, to the same files.
Score with: python eval_ruler.py --model FOLDER"""


def parse_length(text: str) -> int:
    """Return a length in tokens: `4096`, or `4k` for 4 x 1024."""
    number = text.lower().removesuffix("k")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of tokens such as 4096 or 4k, got {text!r}")
    return int(number) * (1024 if text.lower().endswith("k") else 1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `pred_ruler.py`."""
    main = argparse.ArgumentParser(
        prog="pred_ruler.py",
        usage="python pred_ruler.py k_sparsity v_sparsity model mode [options]      (--help lists them)",
        description="Predict RULER with a dense or a Mustafar-pruned KV cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(main)
    main.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        default=["all"],
        help=f"tasks: {', '.join(TASKS)}; or {', '.join(GROUPS)} (default all)",
    )
    main.add_argument(
        "--lengths",
        nargs="+",
        type=parse_length,
        metavar="TOKENS",
        help="prompt and answer together, 4096 or 4k; default: 4k, 8k, ... 128k as far as the model goes",
    )
    main.add_argument("--rows", type=at_least(1), default=500, help="rows of each task and length (500)")
    main.add_argument("--seed", type=int, default=42, help="seed of the rows (42)")
    main.add_argument(
        "--essays",
        type=Path,
        metavar="FILE",
        help="text for the essay haystacks (niah_single_2, _3, niah_multikey_1, niah_multivalue, "
        "niah_multiquery); without it they get the noise sentence",
    )
    main.add_argument("--data_dir", type=Path, help="folder with squad.json and hotpotqa.json")
    add_run_options(main)
    return main


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check what can be checked without loading anything.

    Raises
    ------
    UserError
        If options contradict each other or a rule is unknown.
    """
    args = parser().parse_args(argv)
    args.tasks = [name for text in args.tasks for name in text.split(",") if name]
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir} is not a folder")
    check(args)
    return args
