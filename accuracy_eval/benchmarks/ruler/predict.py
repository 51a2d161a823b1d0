"""The prediction run behind `pred_ruler.py`: tasks and lengths, settings, folder, model, then row after row."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from ..shared import chat, models, options, run, shards, store
from ..shared.errors import UserError
from . import generate, settings
from .documents import SOURCES, load_corpus
from .tasks import Task, data_name, select_lengths, select_tasks

#: The folder of runs in --output_dir.
RUNS = "pred_ruler"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    return run.command(lambda: _main(settings.parse(argv)))


def _main(args: argparse.Namespace) -> None:
    path = predict(args)
    if not shards.current().is_first:
        return
    where = "" if args.output_dir == options.OUTPUT_DIR else f" --output_dir {args.output_dir}"
    script = Path(__file__).resolve().parents[2] / "eval_ruler.py"
    when = "" if store.is_joined(path) else "when all processes are done, "
    print(f"{when}score with: {sys.executable} {script} --model {path.name}{where}")


def predict(args: argparse.Namespace, memory: dict | None = None) -> Path:
    """Predict the rows of a run that its folder does not hold yet; return the folder.

    Parameters
    ----------
    args
        As `settings.parse` returns them.
    memory
        Keeps the rows for the next run with it, if that asks the same.

    Raises
    ------
    UserError
        With what to put right.
    """
    shard = shards.current()
    tasks = select_tasks(args.tasks)
    sources = _load_sources(tasks, args)
    info = models.inspect_model(args.model)
    models.check_mode(info, args.mode)
    lengths = select_lengths(args.lengths, models.position_limit(info), info.name)
    device = models.resolve_device(shard.device(args.device))
    chosen = run.make_settings(args, info, device, benchmark="ruler", max_length=None)
    make = functools.partial(
        generate.make_row,
        seed=args.seed,
        tokenizer=info.tokenizer,
        template=chosen.chat_template,
        sources=sources,
    )
    asked = (args.seed, chosen.model, chosen.model_fingerprint, chosen.chat_template)
    jobs = [
        _job(
            task,
            length,
            args.rows,
            run.remembered(
                functools.partial(make, task, length), memory, task.name, length, sources.digest(task), *asked
            ),
        )
        for length in lengths
        for task in tasks
    ]
    for job in jobs:  # a row that cannot fit is told before anything is written or loaded
        job.row(0)

    name = options.folder_name(chosen, args, info.name)
    path = args.output_dir / RUNS / (name + ("" if args.seed == 42 else f"_seed{args.seed}"))
    if args.essays:
        path = path.with_name(path.name + "_essays")
    folder = store.RunFolder(path, chosen.identity() | {"seed": args.seed}, shard)
    try:
        folder.add_datasets(
            {
                data_name(task, length): {
                    "rows": args.rows,
                    "expected": args.rows,
                    "sha256": sources.digest(task),
                    "task": _describe(task, length, sources),
                }
                for length in lengths
                for task in tasks
            },
            run.environment(),
        )
        if shard.is_first:
            print(f"predictions go to {path}")
            _print_notes(args, tasks, info, chosen)
        run.predict_all(
            jobs,
            folder,
            lambda: models.load_model(info, chosen, device),
            batch_size=chosen.batch_size,
            advice="Choose shorter --lengths, lower --batch_size, or use a larger GPU.",
        )
    finally:
        folder.close()
    return path


def _load_sources(tasks: list[Task], args: argparse.Namespace) -> generate.Sources:
    sources = generate.Sources(generate.load_essays(args.essays) if args.essays else None)
    for name in dict.fromkeys(task.source for task in tasks if task.source):
        sources.corpora[name] = load_corpus(name, args.data_dir)
        there = len(sources.corpora[name].questions)
        if args.rows > there:
            raise UserError(
                f"--rows {args.rows}: {SOURCES[name].title} has {there} questions; choose at most as many"
            )
    return sources


def _job(task: Task, length: int, rows: int, row: Callable[[int], dict]) -> run.Job:
    def record(index: int, row: dict, answer: str) -> dict:
        return {
            "pred": answer,
            "answers": row["outputs"],
            "length": row["length"],
            "dataset": data_name(task, length),
            "_index": index,
        }

    return run.Job(
        name=data_name(task, length),
        task=task,
        expected=rows,
        row=row,
        record=record,
    )


def _describe(task: Task, length: int, sources: generate.Sources) -> dict:
    """Return what must be equal for rows of two runs to stand in one file."""
    described = {"name": task.name, "length": length, "max_new_tokens": task.max_new_tokens}
    described |= {"metric": task.metric, **task.options, "generator": generate.VERSION}
    if task.takes_essays and sources.essays is None:
        described["haystack"] = "noise"
    return described


def _print_notes(args: argparse.Namespace, tasks: list[Task], info, chosen: options.Settings) -> None:
    without = [task.name for task in tasks if task.takes_essays and not args.essays]
    if without:
        print(f"note: without --essays the haystack of {', '.join(without)} is the noise sentence")
    chat.print_unused(args.chat_template, chosen.chat_template, info.tokenizer)
