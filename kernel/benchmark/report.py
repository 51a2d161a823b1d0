"""The CSV, the table, and from which sparsity on the kernels are faster than dense."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .peers import PEERS
from .shapes import ATTENTION_SECTIONS, SECTIONS

Row = dict[str, object]

#: The CSV's columns and their types; an empty field is a value that the row does not have. Times are milliseconds of
#: one call. `bytes` are those of the compressed caches (attention, SpMVs; window, queries and output not counted), or
#: of the dense and the compressed tensor together (compression). `*_ratio` and `vs_best_dense` are times over ours.
COLUMNS: dict[str, type] = {
    "gpu": str, "driver": str, "date": str, "commit": str, "torch": str, "triton": str, "cuda": str,
    "flashinfer": str, "section": str, "op": str, "batch": int, "q_heads": int, "kv_heads": int, "tokens": int,
    "head_dim": int, "window": int, "dtype": str, "sparsity": float, "layout": str,
    "median_ms": float, "p20_ms": float, "p80_ms": float, "graph_ms": float, "bytes": int,
    "tb_per_s": float, "copy_tb_per_s": float, "fraction_of_copy": float,
    **{f"{peer}_{what}": float for peer in PEERS for what in ("ms", "ratio", "graph_ms")},
    "best_dense": str, "vs_best_dense": float, "vs_best_dense_graph": float,
    "max_error": float, "same_dtype_error": float, "accurate": bool,
}  # fmt: skip


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(column: str, text: str) -> object:
    if text == "":
        return None
    kind = COLUMNS[column]
    return text == "True" if kind is bool else kind(text)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the report, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(row.get(name)) for name in COLUMNS} for row in rows)
    os.replace(partial, path)


def read_csv(path: Path) -> list[Row]:
    """The rows of a report, typed as `COLUMNS` says.

    Raises
    ------
    ValueError
        If the file has other columns or values of another type.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(COLUMNS):
            raise ValueError(f"{path} has other columns than this benchmark writes: move it away")
        return [{name: _value(name, text) for name, text in row.items()} for row in reader]


def merged(old: list[Row], new: list[Row], sections: Sequence[str]) -> list[Row]:
    """`new` rows of `sections` and the `old` ones of all others, in the order of the sections."""
    rows = [row for row in old if row["section"] not in sections] + new
    return sorted(rows, key=lambda row: SECTIONS.index(row["section"]))


def faster_from(ratios: dict[float, float]) -> tuple[str, float] | None:
    """From which sparsity on dense / ours stays at 1 or above, by linear interpolation.

    Parameters
    ----------
    ratios : dict
        Dense time over ours, by sparsity.

    Returns
    -------
    ("=", s), ("<=", s) if even the lowest sparsity measured is faster, (">", s) if the highest is not; None for no
    measurements.
    """
    if not ratios:
        return None
    points = sorted(ratios.items(), reverse=True)
    above, ratio_above = points[0]
    if ratio_above < 1:
        return ">", above
    for below, ratio_below in points[1:]:
        if ratio_below < 1:
            step = (1 - ratio_below) / (ratio_above - ratio_below)
            return "=", below + step * (above - below)
        above, ratio_above = below, ratio_below
    return "<=", above


_SHAPE = ("q_heads", "kv_heads", "batch", "tokens", "head_dim", "window", "dtype")


def crossovers(rows: Iterable[Row]) -> list[dict]:
    """`faster_from` of every attention shape measured at two sparsities or more (uniform layout).

    A shape in several sections takes the points of the one with the most, so that they are of one run.
    """
    shapes: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        if row["section"] in ATTENTION_SECTIONS and row["layout"] == "uniform":
            key = tuple(row[name] for name in _SHAPE)
            shapes.setdefault(key, {}).setdefault(row["section"], []).append(row)
    found = []
    for key, by_section in shapes.items():
        section, points = max(by_section.items(), key=lambda item: len(item[1]))
        entry = dict(zip(_SHAPE, key, strict=True)) | {"group": key[0] // key[1], "section": section}
        for name, column in (("eager", "vs_best_dense"), ("cuda_graph", "vs_best_dense_graph")):
            ratios = {row["sparsity"]: row[column] for row in points if row.get(column) is not None}
            answer = faster_from(ratios) if len(ratios) > 1 else None
            if answer is not None:
                entry[name] = {
                    "relation": answer[0],
                    "sparsity": round(answer[1], 3),
                    "dense_over_ours": ratios,
                }
        if "eager" in entry:
            found.append(entry)
    return found


def say_crossover(entry: dict) -> str:
    """One line: the shape, and from which sparsity on the kernel is faster."""

    def words(answer: dict) -> str:
        sparsity = f"{answer['sparsity']:.2f}"
        return {
            "=": f"from {sparsity} on",
            "<=": f"at {sparsity} already, the lowest measured",
            ">": f"not up to {sparsity}, the highest measured",
        }[answer["relation"]]

    in_graph = f"; in a CUDA graph {words(entry['cuda_graph'])}" if "cuda_graph" in entry else ""
    return f"{_shape_text(entry)}: {words(entry['eager'])}{in_graph}"


def _shape_text(row: Row) -> str:
    """A row's shape in short: `32/8 b32 8k D128 f16`, query and KV heads first."""
    tokens = row["tokens"]
    heads = f"{row['q_heads']}/{row['kv_heads']}" if row.get("q_heads") else str(row["kv_heads"])
    length = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
    dtype = str(row["dtype"]).replace("float", "f")
    return f"{heads} b{row['batch']} {length} D{row['head_dim']} {dtype}"


def write_crossovers(path: Path, rows: Sequence[Row]) -> list[dict]:
    """Compute and store the crossovers beside the identity of what was measured; returns them."""
    found = crossovers(rows)
    names = ("gpu", "driver", "date", "commit", "torch", "triton", "cuda", "flashinfer")
    runs = {tuple(row[name] for name in names): None for row in rows}
    report = {
        "what": "sparsity from which on decode attention is faster than the fastest dense attention, linearly "
        "interpolated; '<=': at the lowest measured already, '>': not up to the highest measured",
        "runs": [dict(zip(names, run, strict=True)) for run in runs],
        "shapes": found,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return found


def table(rows: Iterable[Row]) -> str:
    """The rows in a few columns: milliseconds, share of the copy bandwidth, and the best dense peer."""
    head = "op|heads batch tokens|sparsity|ms|in graph|TB/s|of copy|best dense|ms|ratio|in graph"
    lines = [head.split("|")]
    for row in rows:
        best = row.get("best_dense") or ("torch_topk" if row.get("torch_topk_ms") is not None else "")
        ratio = row.get("vs_best_dense") or row.get("torch_topk_ratio")
        general = " general" if row["layout"] == "general" else ""
        lines.append([
            str(row["op"]).replace("decode_", "") + general, _shape_text(row), f"{row['sparsity']:g}",
            _fixed(row["median_ms"], 4), _fixed(row.get("graph_ms"), 4), _fixed(row["tb_per_s"], 2),
            f"{100 * row['fraction_of_copy']:.0f}%", best,
            _fixed(row.get(f"{best.partition(' ')[0]}_ms"), 4), _fixed(ratio, 2),
            _fixed(row.get("vs_best_dense_graph"), 2),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _fixed(value: object, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
