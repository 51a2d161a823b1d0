"""The prediction run behind `long_test.sh`: data, settings, folder, model, then row after row."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from ..shared import chat, models, options, run, shards, store
from ..shared.errors import UserError
from . import data, settings
from .prompts import encode
from .tasks import Task, select_tasks
from .tasks import config as table


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    return run.command(lambda: _main(settings.parse(argv)))


def _main(args: argparse.Namespace) -> None:
    path = predict(args)
    if not shards.current().is_first:
        return
    where = "" if args.output_dir == options.OUTPUT_DIR else f" --output_dir {args.output_dir}"
    script = Path(__file__).resolve().parents[2] / "eval_long_bench.py"
    when = "" if store.is_joined(path) else "when all processes are done, "
    print(f"{when}score with: {sys.executable} {script} --model {path.name}{' --e' if args.e else ''}{where}")


def predict(args: argparse.Namespace, memory: dict | None = None) -> Path:
    """Predict the rows of a run that its folder does not hold yet; return the folder.

    Parameters
    ----------
    args
        As `settings.parse` returns them.
    memory
        Keeps the prompts for the next run with it, if that asks the same.

    Raises
    ------
    UserError
        With what to put right.
    """
    shard = shards.current()
    tasks = _select(args)
    info = models.inspect_model(args.model)  # before the data is downloaded
    rows = {task.name: data.load_rows(task, args.data_dir, longbench_e=args.e) for task in tasks}

    models.check_mode(info, args.mode)
    device = models.resolve_device(shard.device(args.device))
    chosen = run.make_settings(
        args,
        info,
        device,
        benchmark="longbench-e" if args.e else "longbench",
        max_length=resolve_max_length(info, args.max_length),
    )
    path = args.output_dir / ("pred_e" if args.e else "pred") / options.folder_name(chosen, args, info.name)
    folder = store.RunFolder(path, chosen.identity(), shard)
    try:
        expected = {name: min(len(found.rows), args.limit or len(found.rows)) for name, found in rows.items()}
        folder.add_datasets(
            {
                task.name: {
                    "rows": len(rows[task.name].rows),
                    "expected": expected[task.name],
                    "sha256": rows[task.name].sha256,
                    "task": task.describe(),
                }
                for task in tasks
            },
            run.environment(),
        )
        if shard.is_first:
            print(f"predictions go to {path}")
            chat.print_unused(args.chat_template, chosen.chat_template, info.tokenizer)
        asked = (chosen.model, chosen.model_fingerprint, chosen.max_length, chosen.chat_template)
        jobs = [
            run.Job(
                name=task.name,
                task=task,
                expected=expected[task.name],
                row=run.remembered(
                    functools.partial(_row, task, rows[task.name].rows, chosen, info.tokenizer),
                    memory,
                    *(task, rows[task.name].sha256, *asked),
                ),
                record=functools.partial(_record, task),
            )
            for task in tasks
        ]
        run.predict_all(
            jobs,
            folder,
            lambda: models.load_model(info, chosen, device),
            batch_size=chosen.batch_size,
            advice="Lower --max_length or --batch_size, or use a larger GPU.",
        )
    finally:
        folder.close()
    return path


def _row(task: Task, rows: list[dict], chosen: options.Settings, tokenizer, index: int) -> dict:
    limit, template = chosen.max_length, chosen.chat_template
    return rows[index] | {"ids": encode(task, rows[index], tokenizer, max_length=limit, template=template)}


def resolve_max_length(info: models.ModelInfo, given: int | None) -> int:
    """Return the prompt limit: the option's, else that of `model2maxlen.json`, else the model's own.

    Raises
    ------
    UserError
        If none of them is known.
    """
    limit = given or table("model2maxlen").get(info.name) or models.position_limit(info)
    if not limit:
        raise UserError(f"the prompt limit of {info.name} is not known; give --max_length")
    return limit


def _select(args: argparse.Namespace) -> list[Task]:
    """Return the tasks of the run; of a data folder without tasks.json, those whose file is there."""
    tasks = select_tasks(args.datasets, args.data_dir, longbench_e=args.e)
    if args.datasets is not None or args.data_dir is None:
        return tasks
    names = {task.name: data.file_name(task, longbench_e=args.e) for task in tasks}
    there = [task for task in tasks if data.find_file(args.data_dir, names[task.name])]
    if not there:
        raise UserError(f"{args.data_dir} holds none of the data: {', '.join(names.values())} (or data/...)")
    if len(there) < len(tasks):
        absent = [task.name for task in tasks if task not in there]
        print(
            f"note: {args.data_dir} holds {len(there)} of {len(tasks)} data sets; without {', '.join(absent)}"
        )
    return there


def _record(task: Task, index: int, row: dict, answer: str) -> dict:
    return {
        "pred": answer,
        "answers": row["answers"],
        "all_classes": row["all_classes"],
        "length": row["length"],
        "dataset": task.name,
        "_index": index,
    }
