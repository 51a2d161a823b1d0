"""The command line of a LongBench prediction run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..shared.errors import UserError
from ..shared.options import add_model_options, add_run_options, at_least, check

_EXAMPLES = """examples:
  bash long_test.sh 0.7 0.7 meta-llama/Meta-Llama-3-8B-Instruct mustafar
  bash long_test.sh 0 0 mistralai/Mistral-7B-Instruct-v0.2 dense --datasets en
  bash long_test.sh 0.5 0.5 ./my_llama mustafar --data_dir ./my_rows --datasets trec qasper --limit 10
  torchrun --nproc_per_node=4 pred_long_bench.py 0.7 0.7 meta-llama/Meta-Llama-3-8B-Instruct mustafar
Data comes from --data_dir, else accuracy_eval/data, else THUDM/LongBench on the hub. A run that was
interrupted is resumed by the same command. With torchrun (or RANK and WORLD_SIZE set) processes share the
rows, a GPU each, to the same files. Score with: python eval_long_bench.py --model FOLDER"""


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
    add_model_options(main)
    main.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help="data sets, or all, en (the paper's 16), zh; default: those of DATA_DIR/tasks.json, else all",
    )
    main.add_argument("--data_dir", type=Path, help="folder with <data set>.jsonl or data/<data set>.jsonl")
    main.add_argument("--e", action="store_true", help="LongBench-E: the 13 sets of even lengths, to pred_e/")
    main.add_argument("--limit", type=at_least(1), help="only the first LIMIT rows of each data set")
    main.add_argument("--max_length", type=at_least(2), help="prompt limit in tokens (by the model's name)")
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
    if args.datasets:
        args.datasets = [name for text in args.datasets for name in text.split(",") if name]
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir} is not a folder")
    check(args)
    return args
