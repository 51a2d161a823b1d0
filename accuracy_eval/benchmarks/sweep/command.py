"""The command line behind `sweep.py`: every row of a plan predicted, then the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..longbench import predict as longbench_predict
from ..longbench import settings as longbench_settings
from ..report.published import HELP as PUBLISHED_HELP
from ..report.published import read_published
from ..report.write import make_report, title_of, write_report
from ..ruler import predict as ruler_predict
from ..ruler import settings as ruler_settings
from ..shared import models, shards
from ..shared.errors import UserError
from ..shared.run import command
from ..shared.store import is_joined
from .plan import Plan, read_plan

#: Benchmark -> (arguments -> settings, settings and memory -> folder)
BENCHMARKS = {
    "longbench": (longbench_settings.parse, longbench_predict.predict),
    "ruler": (ruler_settings.parse, ruler_predict.predict),
}
#: Options that rows themselves decide, and one that a table cannot show.
_OF_ROWS = ("--k_rule", "--v_rule", "--e")
_EXAMPLES = """examples:
  python sweep.py sweeps/paper.yaml --model meta-llama/Meta-Llama-3-8B-Instruct
  python sweep.py sweeps/paper.yaml --model ./my_llama --data_dir ./my_rows --limit 50 --batch_size 4
  python sweep.py sweeps/paper.yaml --model ./my_llama --rows Dense K0.5 ThinK0.5
Options that are not listed here go to the prediction runs (long_test.sh --help, pred_ruler.py --help).
A sweep that was stopped at any point is resumed by the same command."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description="Predict the configurations of a plan that are not predicted yet, and report them: table.md, "
        "table.csv and plots.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a YAML file, such as sweeps/paper.yaml")
    parser.add_argument("--model", required=True, help="a local folder or a hub id")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the plan")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="default: OUTPUT_DIR/report/<plan>_<model>"
    )
    parser.add_argument("--published", type=Path, metavar="FILE", help=PUBLISHED_HELP)
    args, others = parser.parse_known_args(argv)
    return command(lambda: _run(args, others))


def _run(args: argparse.Namespace, others: list[str]) -> None:
    plan = _chosen(read_plan(args.plan), args.rows)
    published = read_published(args.published) if args.published else []
    published = [row for row in published if row.label in {row.name for row in plan.rows}]
    given = sorted({text.split("=")[0] for text in (*plan.options, *others)} & set(_OF_ROWS))
    if given:
        raise UserError(f"{', '.join(given)} cannot be given to a sweep: the rows of {plan.path} say it")
    parse, predict = BENCHMARKS[plan.benchmark]
    info = models.inspect_model(args.model)
    mode = models.pruned_mode(info)
    # All command lines are checked before the first run.
    runs = [parse([*row.arguments(args.model, mode), *plan.options, *others]) for row in plan.rows]
    memory: dict = {}
    shard = shards.current()
    folders = []
    for number, (row, run) in enumerate(zip(plan.rows, runs, strict=True), start=1):
        if shard.is_first:
            print(f"== {row.name} ({number} of {len(runs)})", flush=True)
        folders.append(predict(run, memory))
    if shard.world > 1 and not all(map(is_joined, folders)):
        print(f"process {shard.rank} of {shard.world} is done; the last process writes the report")
        return
    report = make_report(folders, [row.name for row in plan.rows], published)
    folder = args.report or runs[0].output_dir / "report" / f"{plan.path.stem}_{info.name}"
    paths = write_report(report, folder)
    print(f"\n{paths[0].read_text(encoding='utf-8')}\nreport of {title_of(report)}: {folder}")


def _chosen(plan: Plan, names: list[str] | None) -> Plan:
    if names is None:
        return plan
    known = [row.name for row in plan.rows]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--rows {' '.join(unknown)}: not in {plan.path}; it has {', '.join(known)}")
    return Plan(plan.path, plan.benchmark, plan.options, [row for row in plan.rows if row.name in names])
