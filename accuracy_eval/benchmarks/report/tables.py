"""The tables of a report: columns are groups of data sets, rows are runs; Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from ..longbench.tasks import GROUPS_OF_PAPER
from ..ruler.tasks import parse_data_name
from .intervals import Estimate, agreement, difference, score
from .published import Published
from .runs import Run

AVERAGE = "Average"


@dataclass(frozen=True)
class Report:
    """Comparable runs with their data sets, ready to be shown."""

    runs: list[Run]
    names: list[str]
    published: list[Published]

    @property
    def base(self) -> Run | None:
        """The dense run, which differences are to."""
        return next((run for run in self.runs if run.is_dense), None)

    def columns(self) -> dict[str, list[str]]:
        """The groups of the table and their data sets, the average last.

        LongBench's data sets come in the paper's groups, RULER's tasks by length, others one by one.
        """
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(self._group(name), []).append(name)
        order = [group for group in GROUPS_OF_PAPER if group in groups]
        columns = {group: groups[group] for group in (*order, *(g for g in groups if g not in order))}
        return columns | {AVERAGE: self.names}

    def _group(self, name: str) -> str:
        if self.runs[0].config["benchmark"] == "ruler":
            length = parse_data_name(name)[1]
            return f"{length // 1024}k" if length % 1024 == 0 else str(length)
        return next((group for group, members in GROUPS_OF_PAPER.items() if name in members), name)

    def rows_of(self, name: str) -> int:
        return len(self.runs[0].scores[name])


def markdown(report: Report, title: str) -> str:
    """Return the report as Markdown: the table by group, then every data set with its interval."""
    config = report.runs[0].config
    rows = sorted({report.rows_of(name) for name in report.names})
    count = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    pruned = next((run.config for run in report.runs if not run.is_dense), None)
    sets = "1 data set" if len(report.names) == 1 else f"{len(report.names)} data sets"
    facts = [f"{sets} of {count} rows", f"{config['dtype']} on {config['device']}"]
    if config.get("max_length"):
        facts.insert(1, f"prompts up to {config['max_length']} tokens")
    if pruned:
        facts.append(f"dense window {pruned['residual_length']}")
    made = [f"Predicted with {'; '.join(environments(report))}."] if environments(report) else []
    parts = [
        f"# {title}",
        "",
        " ".join([f"Scores in %, {', '.join(facts)}.", *made]),
        "",
        _by_group(report),
        "",
    ]
    notes = ["KV bytes: what the cache held of a dense one's bytes, window included, measured on these rows."]
    if report.base:
        notes.append(
            "Difference: of the averages, to the dense run on the same rows, in points, with its 95 % interval. "
            "As dense: rows answered word for word as by the dense run, in %, right or wrong."
        )
    notes += dict.fromkeys(f"Published figures: {row.source}." for row in report.published)
    parts += [" ".join(notes), ""]
    parts += ["## By data set, with 95 % intervals", "", _by_name(report), ""]
    intervals = (
        "Wilson's where answers are right or wrong, else normal ones with two rows of 0 and two of 100 added"
    )
    parts += [f"Intervals are {intervals}; differences are of matched pairs (Agresti and Min).", ""]
    return "\n".join(parts)


def environments(report: Report) -> list[str]:
    """What the rows were predicted with, GPU, versions and days: one text if it was the same for all."""
    days: dict[str, set[str]] = {}
    for run in report.runs:
        found = run.config.get("environment") or {}
        for one in (found, *found.get("earlier", [])):
            device = one.get("gpu") if run.config["device"] == "cuda" else "a CPU"
            versions = [
                f"{name} {one[name]}" for name in ("torch", "transformers", "mustafar") if one.get(name)
            ]
            if one.get("date"):
                days.setdefault(", ".join([device or "a GPU", *versions]), set()).add(one["date"][:10])
    return [
        f"{what}, {min(when)}" + (f" to {max(when)}" if len(when) > 1 else "") for what, when in days.items()
    ]


def _by_group(report: Report) -> str:
    columns = report.columns()
    head = ["configuration", "KV bytes", *columns]
    if report.base:
        head += ["difference", "as dense"]
    lines = [head]
    for run in report.runs:
        cells = [run.label, _share(run)]
        cells += [f"{score(run, names).score:.2f}" for names in columns.values()]
        if report.base:
            cells += ["", ""] if run is report.base else [_difference(report, run), _as_dense(report, run)]
        lines.append(cells)
        for row in report.published:
            if row.label == run.label:
                cells = [f"{row.label}, published", ""]
                cells += [f"{row.scores[name]:.2f}" if name in row.scores else "-" for name in columns]
                lines.append(cells + [""] * (len(head) - len(cells)))
    return _grid(lines)


def _difference(report: Report, run: Run) -> str:
    found = difference(run, report.base, report.names)
    return f"{found.score:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _as_dense(report: Report, run: Run) -> str:
    found = agreement(run, report.base, report.names)
    return f"{found.score:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _by_name(report: Report) -> str:
    lines = [["configuration", *report.names]]
    for run in report.runs:
        found = [score(run, [name]) for name in report.names]
        lines.append([run.label, *(f"{e.score:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in found)])
    return _grid(lines)


def _share(run: Run) -> str:
    return "not measured" if run.kv_share is None else f"{100 * run.kv_share:.1f} %"


def _grid(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


CSV_HEAD = (
    "configuration,source,k_rule,k_sparsity,v_rule,v_sparsity,backend,kv_share,kind,name,rows,score,low,high,"
    "difference,difference_low,difference_high,as_dense,as_dense_low,as_dense_high"
).split(",")


def as_csv(report: Report) -> str:
    """Return every score with its interval, a line for each configuration and data set, group or average."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    columns = report.columns()
    for run in report.runs:
        config = run.config
        what = [run.label, "measured", config["k_rule"], config["k_sparsity"], config["v_rule"]]
        what += [
            config["v_sparsity"],
            config["backend"],
            "" if run.kv_share is None else f"{run.kv_share:.4f}",
        ]
        lines = [("data set", name, [name]) for name in report.names]
        lines += [
            ("average" if group == AVERAGE else "group", group, names)
            for group, names in columns.items()
            if group not in report.names
        ]
        for kind, name, names in lines:
            rows = sum(report.rows_of(member) for member in names)
            cells = [kind, name, rows, *_numbers(score(run, names))]
            if report.base and run is not report.base:
                cells += _numbers(difference(run, report.base, names))
                cells += _numbers(agreement(run, report.base, names))
            else:
                cells += [""] * 6
            writer.writerow([*what, *cells])
    for row in report.published:
        for name, value in row.scores.items():
            what = [row.label, f"published: {row.source}", *[""] * 6]
            writer.writerow([*what, "group", name, "", value, *[""] * 8])
    return out.getvalue()


def _numbers(estimate: Estimate) -> list[str]:
    return [f"{value:.2f}" for value in (estimate.score, estimate.low, estimate.high)]
