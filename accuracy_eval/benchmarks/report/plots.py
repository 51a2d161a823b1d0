"""The plots of a report: accuracy against the bytes of the cache, and bars for each task."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..shared.figures import save_figure
from .intervals import Estimate, score
from .runs import Run
from .tables import AVERAGE, Report

MARKERS = "osD^vP*X<>"
#: Up to so many runs stand as bars side by side.
_SIDE_BY_SIDE = 5
_ERROR_LINES = {"linewidth": 0.8, "capthick": 0.8, "ecolor": "black"}
_LINES = ("-", "--", ":", "-.")
#: Inches that a character takes, at the most usual, at font sizes 8 and 10.
_SMALL, _TITLE = 0.068, 0.083


def family(run: Run) -> str:
    """What a run prunes and how, whatever the sparsity: `K Kt_Mag`, `K Kt_Mag, V Vt_Mag`."""
    pruned = [
        f"{of} {run.config[f'{of.lower()}_rule']}" for of in "KV" if run.config[f"{of.lower()}_sparsity"]
    ]
    return ", ".join(pruned) or "dense"


def _figure(width: float, height: float, **options: object):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **options)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes


def _wrapped(title: str, width: float) -> str:
    """A title in lines that a figure so many inches wide has room for."""
    return textwrap.fill(title, max(16, int((width - 0.3) / _TITLE)))


def _error(found: list[Estimate]) -> list[list[float]]:
    return [[max(0.0, e.score - e.low) for e in found], [max(0.0, e.high - e.score) for e in found]]


def accuracy_by_size(report: Report, title: str, path: Path) -> None:
    """Average score with its interval against the measured bytes of the cache; a line for each family of rules."""
    families: dict[str, list[Run]] = {}
    for run in report.runs:
        if run.kv_share is not None and not run.is_dense:
            families.setdefault(family(run), []).append(run)
    pyplot, figure, axes = _figure(9.4, max(5.0, 0.4 + 0.18 * (len(families) + 1)))
    colours = pyplot.get_cmap("tab10")
    base = report.base and score(report.base, report.names)
    if base:
        axes.axhspan(base.low, base.high, color="0.93", zorder=0)
        axes.axhline(base.score, color="0.6", linewidth=0.8, zorder=0)
        axes.errorbar(
            [100], [base.score], yerr=_error([base]), label="dense", marker="o", color="black", capsize=3,
            linestyle="none", zorder=5,
        )  # fmt: skip
    for number, (name, runs) in enumerate(families.items()):
        runs = sorted(runs, key=lambda run: -run.kv_share)
        found = [score(run, report.names) for run in runs]
        shares = [100 * run.kv_share + _aside(run, families) for run in runs]
        # The eleventh has the first's colour with another marker and line.
        style = {
            "color": colours(number % 10),
            "linewidth": 1.2,
            "linestyle": _LINES[number // 10 % len(_LINES)],
        }
        marker = MARKERS[(number + number // 10 + 1) % len(MARKERS)]
        axes.errorbar(
            shares, [e.score for e in found], yerr=_error(found), label=name, capsize=3,
            marker=marker, markersize=5, **style,
        )  # fmt: skip
        if base:
            axes.plot([100, shares[0]], [base.score, found[0].score], alpha=0.35, zorder=1, **style)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))  # no scores above 100
    axes.invert_xaxis()
    axes.set_xlabel(
        "bytes of the KV cache (% of dense, window included; smaller to the right; equal sizes side by side)"
    )
    count = len(report.names)
    axes.set_ylabel(
        f"average score of {count} data sets (%)" if count > 1 else f"score of {report.names[0]} (%)"
    )
    axes.set_title(
        _wrapped(f"{title}: accuracy by measured size of the cache, 95 % intervals", 7.4), fontsize=10
    )
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)
    pyplot.close(figure)


def _aside(run: Run, families: dict[str, list[Run]]) -> float:
    """How far to move a point, in points of size: rules of one sparsity take the same bytes, and side by side
    their intervals can be read."""
    there = [
        name for name, runs in families.items() if any(abs(r.kv_share - run.kv_share) < 0.005 for r in runs)
    ]
    return 0.6 * (there.index(family(run)) - (len(there) - 1) / 2)


def by_task(report: Report, title: str, path: Path) -> None:
    """Bars by data set (by group, where there are many), the average last; for many runs a panel each."""
    columns = report.columns()
    if len(report.names) <= 8:
        columns = {name: [name] for name in report.names}
        if len(report.names) > 1:
            columns[AVERAGE] = report.names
    draw = _grouped_bars if len(report.runs) <= _SIDE_BY_SIDE else _panels
    pyplot, figure = draw(report, columns)
    figure.suptitle(_wrapped(f"{title}: scores with 95 % intervals", figure.get_figwidth()), fontsize=10)
    save_figure(figure, path)
    pyplot.close(figure)


def _grouped_bars(report: Report, columns: dict[str, list[str]]):
    runs = report.runs
    entry = 0.6 + _SMALL * max(len(run.label) for run in runs)  # of the legend
    full = max(6.0, 1.6 + (0.5 + 0.16 * len(runs)) * len(columns), entry)
    pyplot, figure, axes = _figure(full, 4.6)
    width = 0.86 / len(runs)
    for i, run in enumerate(runs):
        found = [score(run, names) for names in columns.values()]
        values = [e.score for e in found]
        places = [n + (i - (len(runs) - 1) / 2) * width for n in range(len(values))]
        axes.bar(
            places, values, width * 0.92, label=run.label, yerr=_error(found), color=_colour(report, i), capsize=3,
            error_kw=_ERROR_LINES,
        )  # fmt: skip
        for place, value in zip(places, values, strict=True):
            axes.text(place, 1.5, f"{value:.1f}", ha="center", fontsize=7)
    axes.set_xticks(range(len(columns)), list(columns))
    if len(columns) > 5:
        axes.tick_params("x", rotation=15)
    if len(columns) > 1:
        axes.axvline(len(columns) - 1.5, color="0.7", linewidth=1)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 102)
    across = min(len(runs), max(1, int(full / entry)))
    figure.legend(loc="outside lower center", ncols=across, frameon=False, fontsize=8)
    return pyplot, figure


def _panels(report: Report, columns: dict[str, list[str]]):
    runs = report.runs
    names = 0.3 + _SMALL * max(len(run.label) for run in runs)
    size = (names + 1.5 * len(columns), 1.3 + 0.24 * len(runs))
    pyplot, figure, grid = _figure(*size, ncols=len(columns), sharey=True, squeeze=False)
    colours = [_colour(report, i) for i in range(len(runs))]
    for axes, (name, names) in zip(grid[0], columns.items(), strict=True):
        found = [score(run, names) for run in runs]
        axes.barh(
            range(len(runs)), [e.score for e in found], 0.84, xerr=_error(found), color=colours, capsize=2,
            error_kw=_ERROR_LINES,
        )  # fmt: skip
        for place, estimate in enumerate(found):
            axes.text(2, place, f"{estimate.score:.1f}", va="center", fontsize=7)
        axes.set_title(name, fontsize=9, fontweight="bold" if name == AVERAGE else None)
        axes.set_xlim(0, 102)
        axes.set_xticks([0, 50, 100])
        axes.tick_params(labelsize=8)
    grid[0, 0].set_yticks(range(len(runs)), [run.label for run in runs])
    grid[0, 0].set_ylim(len(runs) - 0.4, -0.6)  # the first run at the top
    figure.supxlabel("score (%)", fontsize=9)
    return pyplot, figure


def _colour(report: Report, index: int):
    from matplotlib import colormaps

    if report.runs[index].is_dense:
        return "0.72"
    return colormaps["viridis"](0.4 + 0.55 * index / max(1, len(report.runs) - 1))
