"""What LongBench asks: 21 data sets, 13 of them also in LongBench-E, and tasks a data folder may add."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..shared.errors import UserError
from .metrics import METRICS

CONFIG_DIR = Path(__file__).parent / "config"


def config(name: str) -> dict:
    """Return one of the tables in `config/`, for example `config("model2maxlen")`."""
    return json.loads((CONFIG_DIR / f"{name}.json").read_text(encoding="utf-8"))


#: The data sets in the official order. The paper's tables use the 16 English ones.
NAMES = list(config("dataset2prompt"))
CHINESE = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"]
ENGLISH = [name for name in NAMES if name not in CHINESE]
LONGBENCH_E = [name for name in ENGLISH if name not in ("narrativeqa", "musique", "qmsum")]
#: Shorthands `--datasets` accepts beside single names.
GROUPS = {"all": NAMES, "en": ENGLISH, "zh": CHINESE}

#: The paper's tables show these groups; the Chinese sets join those of their kind.
GROUPS_OF_PAPER = {
    "Single-Doc QA": ["narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"],
    "Multi-Doc QA": ["hotpotqa", "2wikimqa", "musique", "dureader"],
    "Summarization": ["gov_report", "qmsum", "multi_news", "vcsum"],
    "Few-shot": ["trec", "triviaqa", "samsum", "lsht"],
    "Synthetic": ["passage_count", "passage_retrieval_en", "passage_retrieval_zh"],
    "Code": ["lcc", "repobench-p"],
}

# Few-shot and code sets, which the benchmark asks without a chat template ...
_WITHOUT_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
# ... and those of them of which only the answer's first line is scored.
_FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}


@dataclass(frozen=True)
class Task:
    """How one data set is asked and scored.

    Attributes
    ----------
    name
        The data set; its rows are in `<name>.jsonl`.
    prompt
        Template filled from a row with `str.format`.
    max_new_tokens
        Generation limit.
    metric
        A key of `metrics.METRICS`.
    chat
        Whether a chat template may be put around the prompt.
    first_line
        Whether only the first line of an answer is scored.
    stop_at_newline
        Whether a newline also ends the answer, after at least one token (samsum).
    """

    name: str
    prompt: str
    max_new_tokens: int
    metric: str
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False

    def describe(self) -> dict:
        """Return the fields but the name, as a tasks.json or a run's config.json holds them."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def longbench_tasks() -> dict[str, Task]:
    """Return the 21 official tasks by name, in the official order."""
    prompts, lengths, metrics = (config(f"dataset2{table}") for table in ("prompt", "maxlen", "metric"))
    return {
        name: Task(
            name=name,
            prompt=prompts[name],
            max_new_tokens=lengths[name],
            metric=metrics[name],
            chat=name not in _WITHOUT_CHAT,
            first_line=name in _FIRST_LINE,
            stop_at_newline=name == "samsum",
        )
        for name in NAMES
    }


def task_from_description(name: str, description: object, where: str) -> Task:
    """Check one entry of a tasks.json (or of a config.json) and return it as a `Task`.

    Raises
    ------
    UserError
        If a key is missing, unknown or of the wrong type; `where` names the file.
    """
    if not isinstance(description, dict):
        raise UserError(f"{where}: task {name!r} must be an object, got {type(description).__name__}")
    kinds = {field.name: field.type for field in fields(Task) if field.name != "name"}
    types = {"str": str, "int": int, "bool": bool}
    missing = [key for key in ("prompt", "max_new_tokens", "metric") if key not in description]
    if missing:
        raise UserError(f"{where}: task {name!r} lacks {', '.join(missing)}; a task has {', '.join(kinds)}")
    for key, value in description.items():
        if key not in kinds and key != "description":
            raise UserError(
                f"{where}: task {name!r} has an unknown key {key!r}; a task has {', '.join(kinds)}"
            )
        if key in kinds and type(value) is not types[kinds[key]]:
            raise UserError(f"{where}: task {name!r}: {key} must be {kinds[key]}, got {value!r}")
    if description["metric"] not in METRICS:
        raise UserError(
            f"{where}: task {name!r} has an unknown metric {description['metric']!r}; "
            f"valid ones: {', '.join(METRICS)}"
        )
    if description["max_new_tokens"] < 1:
        raise UserError(f"{where}: task {name!r}: max_new_tokens must be at least 1")
    return Task(name=name, **{key: value for key, value in description.items() if key in kinds})


def extra_tasks(data_dir: Path | None) -> dict[str, Task]:
    """Return the tasks that `data_dir/tasks.json` describes; an empty dict where there is no such file."""
    path = data_dir / "tasks.json" if data_dir else None
    if path is None or not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(described, dict) or not described:
        raise UserError(f"{path} must be an object of task name -> description")
    for name in described:
        if name in NAMES:
            raise UserError(f"{path}: {name!r} is a LongBench data set; give the task another name")
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"{path}: {name!r} cannot be a task's name, because it names a file")
    return {name: task_from_description(name, entry, str(path)) for name, entry in described.items()}


def select_tasks(names: list[str] | None, data_dir: Path | None, *, longbench_e: bool) -> list[Task]:
    """Return the tasks of a run.

    Parameters
    ----------
    names
        Data sets or groups (`all`, `en`, `zh`), or None: the tasks of `data_dir/tasks.json` if it exists,
        else every data set of the benchmark.
    data_dir
        Folder of the data, or None.
    longbench_e
        Whether LongBench-E is run.

    Raises
    ------
    UserError
        If a name is not known; the message lists the valid ones.
    """
    added = extra_tasks(data_dir)
    benchmark = LONGBENCH_E if longbench_e else NAMES
    if names is None:
        names = list(added) or list(benchmark)
    known = longbench_tasks() | added
    valid = [*benchmark, *added]
    chosen: dict[str, Task] = {}
    for name in names:
        members = [member for member in GROUPS.get(name, [name]) if name not in GROUPS or member in valid]
        for member in members:
            if member not in valid:
                of = " of LongBench-E" if longbench_e else ""
                raise UserError(
                    f"unknown data set{of} {member!r}; valid ones: {', '.join(valid)} "
                    f"(or {', '.join(GROUPS)})"
                )
            chosen[member] = known[member]
    if not chosen:
        raise UserError(f"no data set chosen; valid ones: {', '.join(valid)} (or {', '.join(GROUPS)})")
    return list(chosen.values())
