"""The command line behind `report.py`: runs that are there, set side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..shared.run import command
from .published import HELP as PUBLISHED_HELP
from .published import read_published
from .write import left_out, make_report, title_of, write_report


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Set prediction runs of one model side by side: table.md, table.csv and plots. The runs of a "
        "plan are predicted and reported by sweep.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, such as pred/..."
    )
    parser.add_argument("--report", type=Path, default=Path("report"), metavar="DIR", help="%(default)s")
    parser.add_argument("--published", type=Path, metavar="FILE", help=PUBLISHED_HELP)
    args = parser.parse_args(argv)
    return command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    published = read_published(args.published) if args.published else []
    report = make_report(args.runs, published=published)
    paths = write_report(report, args.report)
    print(paths[0].read_text(encoding="utf-8"))
    if without := left_out(report):
        print(f"left out, not in every run: {', '.join(without)}")
    print(f"report of {title_of(report)}: {args.report}")
