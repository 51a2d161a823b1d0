"""A report from runs' folders to a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shared.errors import UserError
from ..shared.store import replace_file
from . import plots, tables
from .published import Published
from .runs import check_comparable, read_run

BENCHMARKS = {"longbench": "LongBench format", "ruler": "RULER"}


def make_report(
    folders: Sequence[Path], labels: Sequence[str | None] | None = None, published: Sequence[Published] = ()
) -> tables.Report:
    """Read and compare the runs in `folders`.

    Raises
    ------
    UserError
        If a run is unusable, or the runs do not make one table.
    """
    labels = labels or [None] * len(folders)
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    names = check_comparable(runs)
    unknown = [row.label for row in published if row.label not in {run.label for run in runs}]
    if unknown:
        raise UserError(
            f"published figures of {', '.join(unknown)}: no such row; there are {', '.join(r.label for r in runs)}"
        )
    return tables.Report(runs, names, list(published))


def title_of(report: tables.Report) -> str:
    """Return what a report is of: model and benchmark."""
    config = report.runs[0].config
    return f"{Path(config['model']).name}, {BENCHMARKS[config['benchmark']]}"


def left_out(report: tables.Report) -> list[str]:
    """Return the data sets that not every run has."""
    return sorted({name for run in report.runs for name in run.scores} - set(report.names))


def write_report(report: tables.Report, folder: Path) -> list[Path]:
    """Write table.md, table.csv and the plots to `folder`; return their paths.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    title = title_of(report)
    paths = [folder / name for name in ("table.md", "table.csv", "accuracy_by_size.png", "by_task.png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], tables.markdown(report, title))
        replace_file(paths[1], tables.as_csv(report))
        plots.accuracy_by_size(report, title, paths[2])
        plots.by_task(report, title, paths[3])
    except OSError as error:
        raise UserError(f"cannot write the report to {folder} ({error.strerror})") from None
    return paths
