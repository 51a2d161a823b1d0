"""The plots of a report: accuracy against the bytes of the cache, and bars for each task."""

from __future__ import annotations

from pathlib import Path

from .runs import Run
from .tables import AVERAGE, Report

MARKERS = "osD^vP*X<>"


def family(run: Run) -> str:
    """What a run prunes and how, whatever the sparsity: `K Kt_Mag`, `K Kt_Mag, V Vt_Mag`."""
    pruned = [
        f"{of} {run.config[f'{of.lower()}_rule']}" for of in "KV" if run.config[f"{of.lower()}_sparsity"]
    ]
    return ", ".join(pruned) or "dense"


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes


def accuracy_by_size(report: Report, title: str, path: Path) -> None:
    """Average score with its interval against the measured bytes of the cache; a line for each family of rules."""
    pyplot, figure, axes = _figure(8.4, 5)
    families: dict[str, list[Run]] = {}
    for run in report.runs:
        if run.kv_share is not None:
            families.setdefault(family(run), []).append(run)
    colours = pyplot.get_cmap("tab10")
    for number, (name, runs) in enumerate(families.items()):
        runs = sorted(runs, key=lambda run: -run.kv_share)
        found = [report.resampled.mean(run, report.names) for run in runs]
        shares, scores = [100 * run.kv_share for run in runs], [e.score for e in found]
        error = [[e.score - e.low for e in found], [e.high - e.score for e in found]]
        axes.errorbar(
            shares, scores, yerr=error, label=name, marker=MARKERS[number % len(MARKERS)], capsize=2,
            color="black" if name == "dense" else colours(number % 10), linewidth=1.2, markersize=5,
        )  # fmt: skip
    if report.base:
        dense = report.resampled.mean(report.base, report.names).score
        axes.axhline(dense, color="0.7", linewidth=0.8, zorder=0)
    axes.invert_xaxis()
    axes.set_xlabel("bytes of the KV cache (% of dense, window included), smaller to the right")
    axes.set_ylabel(f"average score of {len(report.names)} data sets (%)")
    axes.set_title(f"{title}: accuracy by measured size of the cache", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def by_task(report: Report, title: str, path: Path) -> None:
    """Bars by data set (by group, where there are many), one colour a run, the average at the right."""
    columns = report.columns()
    if len(report.names) <= 8:
        columns = {name: [name] for name in report.names} | {AVERAGE: report.names}
    runs = report.runs
    pyplot, figure, axes = _figure(max(7.0, 1.6 + (0.5 + 0.16 * len(runs)) * len(columns)), 4.4)
    width = 0.84 / len(runs)
    colours = pyplot.get_cmap("viridis")
    for i, run in enumerate(runs):
        found = [report.resampled.mean(run, names) for names in columns.values()]
        values = [e.score for e in found]
        error = [
            [max(0.0, e.score - e.low) for e in found],
            [max(0.0, e.high - e.score) for e in found],
        ]
        places = [n + (i - (len(runs) - 1) / 2) * width for n in range(len(values))]
        axes.bar(
            places, values, width * 0.92, label=run.label, yerr=error,
            color=colours(0.1 + 0.8 * i / max(1, len(runs) - 1)), error_kw={"linewidth": 0.7, "ecolor": "0.3"},
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), list(columns), rotation=15, ha="right")
    axes.axvline(len(columns) - 1.5, color="0.7", linewidth=1)
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 105)
    axes.set_title(f"{title}: scores with 95 % intervals", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(7, len(runs)), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
