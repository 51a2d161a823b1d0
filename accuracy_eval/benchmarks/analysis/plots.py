"""The plots of an analysis: magnitudes by channel, patterns of what rules keep, errors by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..shared.figures import save_figure
from .measure import Case, Magnitudes

#: Tokens that a pattern shows.
TOKENS_SHOWN = 96


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def by_channel(found: dict[int, tuple[Magnitudes, Magnitudes]], head: int, title: str, path: Path) -> None:
    """|K| and |V| of one head by channel: the median over tokens, and a band of 5 to 95 %; a row for each layer."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        len(found), 2, figsize=(10, 1.2 + 1.7 * len(found)), squeeze=False, sharex=True, layout="constrained"
    )
    for row, (layer, pair) in zip(grid, found.items(), strict=True):
        for axes, name, one, colour in zip(row, ("K", "V"), pair, ("tab:blue", "tab:orange"), strict=True):
            low, middle, high = one.quantiles[:, head].numpy()
            channels = np.arange(len(middle))
            axes.fill_between(channels, low, high, step="mid", alpha=0.35, color=colour, linewidth=0)
            axes.step(channels, middle, where="mid", linewidth=0.9, color=colour)
            axes.set_ylim(0, None)
            axes.set_xlim(-0.5, len(middle) - 0.5)
            axes.set_title(f"layer {layer}, |{name}|", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("channel", fontsize=9)
    figure.suptitle(
        f"{title}: magnitudes in KV head {head}; line: median over tokens, band: 5 to 95 %", fontsize=10
    )
    save_figure(figure, path)
    pyplot.close(figure)


def patterns(shown: dict[str, list[tuple[str, np.ndarray]]], title: str, path: Path) -> None:
    """What stays of keys and of values: `shown` is K or V -> (heading, magnitudes [tokens, D], 0 where pruned)."""
    pyplot = _pyplot()
    columns = max(map(len, shown.values()))
    figure, grid = pyplot.subplots(
        len(shown), columns, figsize=(1.2 + 2.5 * columns, 0.6 + 2.3 * len(shown)), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
    colours = pyplot.get_cmap("viridis").with_extremes(bad="white")
    for row, (name, panels) in zip(grid, shown.items(), strict=True):
        top = np.quantile(panels[0][1], 0.995)
        image = None
        for axes, (heading, kept) in zip(row, panels, strict=False):
            hidden = np.ma.masked_equal(kept, 0)
            image = axes.imshow(
                hidden, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
            )
            axes.set_title(heading, fontsize=9)
            axes.tick_params(labelsize=8)
        for axes in row[len(panels) :]:
            axes.axis("off")
        row[0].set_ylabel("token", fontsize=9)
        figure.colorbar(image, ax=list(row), label=f"|{name}|", fraction=0.03, pad=0.01).ax.tick_params(
            labelsize=8
        )
    for axes in grid[-1]:
        axes.set_xlabel("channel", fontsize=9)
    figure.suptitle(f"{title}; pruned elements white", fontsize=10)
    save_figure(figure, path)
    pyplot.close(figure)


def errors(found: dict[Case, list[float]], layers: list[int], title: str, path: Path) -> None:
    """Error of the attention output by layer: panels for keys, values, both; a colour a rule, a line a sparsity."""
    pyplot = _pyplot()
    headings = {"keys": (True, False), "values": (False, True), "both": (True, True)}
    panels = {
        heading: [case for case in found if (bool(case.k_rule), bool(case.v_rule)) == which]
        for heading, which in headings.items()
    }
    panels = {heading: members for heading, members in panels.items() if members}
    figure, row = pyplot.subplots(
        1,
        len(panels),
        figsize=(0.8 + 3.7 * len(panels), 4.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    sparsities = sorted({case.k_sparsity or case.v_sparsity for case in found})
    styles = ("-", "--", ":", "-.")
    colours = pyplot.get_cmap("tab10")
    for axes, (heading, members) in zip(row[0], panels.items(), strict=True):
        rules = list(dict.fromkeys(case.label for case in members))
        for case in members:
            sparsity = case.k_sparsity or case.v_sparsity
            axes.plot(
                layers, [100 * value for value in found[case]], color=colours(rules.index(case.label) % 10),
                linestyle=styles[sparsities.index(sparsity) % len(styles)], marker="o", markersize=3, linewidth=1.2,
                label=f"{case.label} {sparsity:g}",
            )  # fmt: skip
        axes.set_title(f"{heading} pruned", fontsize=9)
        axes.set_xlabel("layer", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    row[0, 0].set_ylim(0, None)
    row[0, 0].set_ylabel("error of the attention output (% of its norm)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
    pyplot.close(figure)
