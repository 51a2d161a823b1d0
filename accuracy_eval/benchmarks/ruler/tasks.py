"""The 13 tasks of RULER with the parameters of its main table (arXiv 2404.06654, section 3 and appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..shared.errors import UserError

#: Lengths of the benchmark in tokens, prompt and answer budget together: 4k to 128k.
LENGTHS = tuple(1024 * k for k in (4, 8, 16, 32, 64, 128))


@dataclass(frozen=True)
class Task:
    """A task, whatever its length.

    Attributes
    ----------
    name
        As RULER spells it.
    family
        The generator: a key of `generate.FAMILIES`.
    max_new_tokens
        Answer budget in tokens; it is part of a row's length.
    metric
        A key of `scoring.METRICS`.
    options
        What the generator is told.
    source
        The local file a row needs, a key of `documents.SOURCES`; None: rows come from the seed alone.
    """

    name: str
    family: str
    max_new_tokens: int
    metric: str = "string_match_all"
    options: Mapping[str, object] = field(default_factory=dict)
    source: str | None = None

    @property
    def takes_essays(self) -> bool:
        """Whether the benchmark's haystack for this task is essays."""
        return self.options.get("haystack") == "essay"


def _needle(name: str, haystack: str, key: str = "words", value: str = "numbers", **counts: int) -> Task:
    return Task(name, "niah", 128, options={"haystack": haystack, "key": key, "value": value} | counts)


TASKS = {
    task.name: task
    for task in (
        _needle("niah_single_1", "noise"),
        _needle("niah_single_2", "essay"),
        _needle("niah_single_3", "essay", value="uuids"),
        _needle("niah_multikey_1", "essay", keys=4),
        _needle("niah_multikey_2", "needle"),
        _needle("niah_multikey_3", "needle", key="uuids", value="uuids"),
        _needle("niah_multivalue", "essay", values=4),
        _needle("niah_multiquery", "essay", keys=4, queries=4),
        Task("vt", "vt", 30),
        Task("cwe", "cwe", 120),
        Task("fwe", "fwe", 50),
        Task("qa_1", "qa", 32, metric="string_match_part", source="squad"),
        Task("qa_2", "qa", 32, metric="string_match_part", source="hotpotqa"),
    )
}

#: Shorthands `--tasks` accepts beside single names; `synthetic` is what needs no file.
GROUPS = {
    "all": list(TASKS),
    "synthetic": [name for name, task in TASKS.items() if task.source is None],
    "niah": [name for name, task in TASKS.items() if task.family == "niah"],
    "qa": [name for name, task in TASKS.items() if task.source is not None],
}


def select_tasks(names: list[str]) -> list[Task]:
    """Return the tasks of these names and groups, each once.

    Raises
    ------
    UserError
        If a name is not known; the message lists the valid ones.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        for member in GROUPS.get(name, [name]):
            if member not in TASKS:
                raise UserError(
                    f"unknown RULER task {member!r}; valid ones: {', '.join(TASKS)} (or {', '.join(GROUPS)})"
                )
            chosen[member] = TASKS[member]
    return list(chosen.values())


def select_lengths(asked: list[int] | None, limit: int | None, model_name: str) -> list[int]:
    """Return the lengths of a run in tokens, ascending.

    Parameters
    ----------
    asked
        The lengths asked for, or None: those of the benchmark that the model can take.
    limit
        How many tokens the model was made for, None if that is not known.

    Raises
    ------
    UserError
        If a length is beyond the limit, or no length of the benchmark is within it.
    """
    if asked is None:
        within = [length for length in LENGTHS if limit is None or length <= limit]
        if not within:
            raise UserError(
                f"{model_name} takes {limit} tokens, less than RULER's shortest length of {LENGTHS[0]}; "
                f"give --lengths up to {limit}"
            )
        return within
    beyond = [length for length in asked if limit is not None and length > limit]
    if beyond:
        raise UserError(
            f"--lengths {' '.join(map(str, beyond))}: {model_name} takes {limit} tokens, prompt and answer "
            f"together (max_position_embeddings of its config.json); choose lengths up to {limit}"
        )
    return sorted(set(asked))


def data_name(task: Task, length: int) -> str:
    """Return the name of a task's rows at a length, which names its file: `vt_4096`."""
    return f"{task.name}_{length}"


def parse_data_name(name: str) -> tuple[Task, int] | None:
    """Return task and length of a `data_name`, None if it is not one."""
    task, _, length = name.rpartition("_")
    return (TASKS[task], int(length)) if task in TASKS and length.isdecimal() else None
