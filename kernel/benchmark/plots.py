"""Latency against sparsity, context length and batch: PNG files, dense peers as dashed lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .peers import PEERS

Row = dict[str, object]
#: One colour a line, the same in every plot; those of seaborn's colourblind palette.
OURS = {0.5: "#0173b2", 0.7: "#de8f05"}
DENSE = ["#029e73", "#7fbf9f", "#cc78bc", "#e8b7d8", "#949494", "#ca9161", "#56b4e9"]
COLOURS = dict(zip(PEERS, [*DENSE, "#444444"], strict=True))


def draw(rows: Sequence[Row], folder: Path, slug: str) -> list[Path]:
    """Draw what `rows` has: `<slug>_sparsity.png`, `<slug>_context.png`, `<slug>_batch.png`; those written.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for section, drawing in (("sweep", _sparsity), ("context", _context), ("batch", _batch)):
        part = [row for row in rows if row["section"] == section and row["op"] == "decode_attention"]
        if part:
            name = {"sweep": "sparsity"}.get(section, section)
            path = folder / f"{slug}_{name}.png"
            drawing(part, path)
            written.append(path)
    return written


def _groups(rows: Sequence[Row], key: Callable[[Row], tuple]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _heads(row: Row) -> str:
    return f"{row['q_heads']} query / {row['kv_heads']} KV heads of {row['head_dim']}, {row['dtype']}"


def _figure(rows: int, columns: int, first: Row):
    from matplotlib import pyplot

    size = (max(6.6, 0.6 + 4.6 * columns), 1.9 + 2.8 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    title = f"Decode attention on {first['gpu']}\n{_heads(first)} (commit {first['commit']})"
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure, axes, path: Path) -> None:
    from matplotlib import pyplot

    entries: dict[str, object] = {}
    for axis in axes.flat:
        entries |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=1 + axes.shape[1], frameon=False,
        fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _peers(rows: Sequence[Row]) -> list[str]:
    return [peer for peer in PEERS if any(row.get(f"{peer}_ms") is not None for row in rows)]


def _sparsity(rows: Sequence[Row], path: Path) -> None:
    panels = _groups(rows, lambda row: (row["q_heads"], row["kv_heads"], row["batch"], row["tokens"]))
    figure, axes = _figure(1, len(panels), rows[0])
    for axis, ((_, _, batch, tokens), panel) in zip(axes[0], panels.items(), strict=True):
        panel = sorted(panel, key=lambda row: row["sparsity"])
        x = [100 * row["sparsity"] for row in panel]
        axis.fill_between(
            x, [row["p20_ms"] for row in panel], [row["p80_ms"] for row in panel], color=OURS[0.5], alpha=0.2
        )
        axis.plot(x, [row["median_ms"] for row in panel], "o-", color=OURS[0.5], label="Mustafar (20-80 %)")
        floor = [row["bytes"] / row["copy_tb_per_s"] / 1e9 for row in panel]
        axis.plot(x, floor, ":", color="0.4", label="its bytes at copy bandwidth")
        for peer in _peers(panel):
            y = [row[f"{peer}_ms"] for row in panel]
            axis.plot(x, y, "--", color=COLOURS[peer], label=f"dense: {PEERS[peer]}")
        axis.set_title(f"batch {batch}, {tokens:,} tokens", fontsize=9)
        axis.set_xlabel("sparsity of keys and values (%)")
        axis.set_ylabel("latency (ms)")
        axis.set_ylim(bottom=0)
    _save(figure, axes, path)


def _context(rows: Sequence[Row], path: Path) -> None:
    _against(rows, path, "tokens", "batch", "tokens in the compressed cache", "batch {}")


def _batch(rows: Sequence[Row], path: Path) -> None:
    _against(rows, path, "batch", "tokens", "batch (sequences)", "{:,} tokens")


def _against(rows: Sequence[Row], path: Path, x_name: str, panel_name: str, label: str, title: str) -> None:
    """Above the latency, below the speed relative to the best dense peer; a column a panel."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    panels = _groups(rows, lambda row: (row[panel_name],))
    figure, axes = _figure(2, len(panels), rows[0])
    for column, ((value,), panel) in enumerate(panels.items()):
        upper, lower = axes[:, column]
        lines = _groups(sorted(panel, key=lambda row: row[x_name]), lambda row: (row["sparsity"],))
        for (sparsity,), line in sorted(lines.items()):
            colour, name = OURS.get(sparsity, "0.2"), f"Mustafar, {100 * sparsity:g} %"
            _line(upper, line, x_name, "median_ms", "o-", colour, name)
            _line(lower, line, x_name, "vs_best_dense", "o-", colour, name)
            graph = f"{name}, both in a CUDA graph"
            _line(lower, line, x_name, "vs_best_dense_graph", "s:", colour, graph, markerfacecolor="white")
        line = next(iter(lines.values()))
        for peer in _peers(line):
            _line(upper, line, x_name, f"{peer}_ms", ".--", COLOURS[peer], f"dense: {PEERS[peer]}")
        lower.axhline(1, color="0.4", linewidth=1)
        lower.set_ylim(bottom=0)
        upper.set_yscale("log")
        upper.set_title(title.format(value), fontsize=9)
        upper.set_ylabel("latency (ms)")
        lower.set_ylabel("times the speed of the best dense")
        lower.set_xlabel(label)
        ticks = sorted({row[x_name] for row in panel})
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [_short(tick) for tick in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        upper.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
    _save(figure, axes, path)


def _short(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _line(
    axis, line: Sequence[Row], x_name: str, y_name: str, style: str, colour: str, label: str, **how: object
) -> None:
    """One line through the rows that have a value; none, no line."""
    points = [(row[x_name], row[y_name]) for row in line if row.get(y_name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, **how)
