"""Figures published elsewhere, from a file of the user's, to stand beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..shared.errors import UserError
from ..shared.yamlfile import read_yaml

HELP = (
    "figures published elsewhere, to stand beside the rows of the same name, marked as published; none are bundled. "
    "A YAML such as {source: 'table and paper', rows: [{name: Dense, scores: {Average: 12.3}}]}"
)


@dataclass(frozen=True)
class Published:
    """A published row: the configuration it belongs beside, scores by column, and where they were published."""

    label: str
    scores: dict[str, float]
    source: str


def read_published(path: Path) -> list[Published]:
    """Read a YAML file of published rows::

        source: Table 2 of arXiv 2505.22913, Llama-3-8B-Instruct
        rows:
          - {name: Dense, scores: {Average: 40.0}}

    Raises
    ------
    UserError
        If the file is not of this form.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"source", "rows"}:
        raise UserError(f"{path}: expected the keys source (where the figures were published) and rows")
    if not isinstance(content["source"], str) or not isinstance(content["rows"], list):
        raise UserError(f"{path}: source must be a text, rows a list")
    found = []
    for number, row in enumerate(content["rows"], start=1):
        is_row = isinstance(row, dict) and set(row) == {"name", "scores"} and isinstance(row["scores"], dict)
        if not is_row or not all(isinstance(value, int | float) for value in row["scores"].values()):
            raise UserError(
                f"{path}, row {number}: expected {{name: ..., scores: {{column: number}}}}, got {row!r:.80}"
            )
        found.append(Published(str(row["name"]), row["scores"], content["source"]))
    return found
