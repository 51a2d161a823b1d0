"""A sweep's plan: which configurations its table has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..shared.errors import UserError
from ..shared.options import DEFAULTS
from ..shared.yamlfile import read_yaml

BENCHMARKS = ("longbench", "ruler")
_KEYS = ("benchmark", "options", "rows")
_ROW_KEYS = ("name", "k_sparsity", "v_sparsity", "k_rule", "v_rule")


@dataclass(frozen=True)
class Row:
    """One configuration; dense where neither sparsity is given."""

    name: str
    k_sparsity: float = 0.0
    v_sparsity: float = 0.0
    k_rule: str = DEFAULTS["k_rule"]
    v_rule: str = DEFAULTS["v_rule"]

    @property
    def is_dense(self) -> bool:
        return not self.k_sparsity and not self.v_sparsity

    def arguments(self, model: str, mode: str) -> list[str]:
        """Return the arguments of its prediction run; `mode` is that of a pruned cache."""
        if self.is_dense:
            return ["0", "0", model, "dense"]
        sparsities = [str(self.k_sparsity), str(self.v_sparsity)]
        return [*sparsities, model, mode, "--k_rule", self.k_rule, "--v_rule", self.v_rule]


@dataclass(frozen=True)
class Plan:
    """The rows of a table, and the options that all of its runs have."""

    path: Path
    benchmark: str
    options: list[str]
    rows: list[Row]


def read_plan(path: Path) -> Plan:
    """Read a plan::

        benchmark: longbench          # or ruler
        options: {datasets: [en]}     # of long_test.sh or pred_ruler.py, for all rows
        rows:
          - {name: Dense}
          - {name: ThinK0.5, k_sparsity: 0.5, k_rule: ThinK}

    Raises
    ------
    UserError
        If the file is not a plan; the message names the row.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or "rows" not in content:
        raise UserError(f"{path} is no plan: expected the keys {', '.join(_KEYS)}")
    _check_keys(f"{path}", content, _KEYS)
    benchmark = content.get("benchmark", "longbench")
    if benchmark not in BENCHMARKS:
        raise UserError(f"{path}: benchmark {benchmark!r} is not known; valid ones: {', '.join(BENCHMARKS)}")
    if not isinstance(content["rows"], list) or not content["rows"]:
        raise UserError(f"{path}: rows must be a list of configurations, such as - {{name: Dense}}")
    rows: list[Row] = []
    for number, entry in enumerate(content["rows"], start=1):
        row = _row(f"{path}, row {number}", entry)
        for other in rows:
            if other.name == row.name:
                raise UserError(f"{path}, row {number}: the name {row.name!r} is there twice; rename one")
            if _configuration(other) == _configuration(row):
                raise UserError(
                    f"{path}, row {number}: {row.name!r} is the configuration of {other.name!r}; drop one of them"
                )
        rows.append(row)
    return Plan(path, benchmark, _options(path, content.get("options") or {}), rows)


def _check_keys(where: str, entry: dict, valid: tuple[str, ...]) -> None:
    unknown = [str(key) for key in entry if key not in valid]
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; valid ones: {', '.join(valid)}")


def _row(where: str, entry: object) -> Row:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected {{name: ..., k_sparsity: ...}}, got {entry!r:.80}")
    _check_keys(where, entry, _ROW_KEYS)
    if not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: it needs a name, a text")
    for key in ("k_sparsity", "v_sparsity"):
        value = entry.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"{where} ({entry['name']}): {key} must be in [0, 1), got {value!r}")
    for key, sparsity in (("k_rule", "k_sparsity"), ("v_rule", "v_sparsity")):
        if key in entry and not entry.get(sparsity):
            raise UserError(f"{where} ({entry['name']}): {key} does nothing without {sparsity}; give both")
    return Row(**entry)


def _configuration(row: Row) -> tuple:
    return row.k_sparsity, row.v_sparsity, row.k_rule, row.v_rule


def _options(path: Path, options: object) -> list[str]:
    """The options as a command line has them: `--datasets en --limit 10`; a flag is `true`."""
    if not isinstance(options, dict):
        raise UserError(f"{path}: options must be a map, such as {{limit: 10}}")
    found: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        found.append(f"--{name}")
        if value is not True:
            found += [str(item) for item in (value if isinstance(value, list) else [value])]
    return found
