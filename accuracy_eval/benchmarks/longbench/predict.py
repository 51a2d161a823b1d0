"""The prediction run behind `long_test.sh`: data, settings, folder, model, then row after row."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import data, models, settings, store
from .errors import UserError
from .prompts import resolve_chat_template
from .tasks import Task, select_tasks


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    try:
        args = settings.parse(argv)
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    tasks = _select(args)
    rows = {task.name: data.load_rows(task, args.data_dir, longbench_e=args.e) for task in tasks}

    info = models.inspect_model(args.model)
    models.check_mode(info, args.mode)
    device = models.resolve_device(args.device)
    run = _settings(args, info, device)
    path = args.output_dir / ("pred_e" if args.e else "pred") / settings.folder_name(run, args, info.name)
    folder = store.RunFolder(path, run.identity())
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
            _environment(),
        )
        print(f"predictions go to {path}")
        if (
            run.chat_template == "none"
            and args.chat_template == "auto"
            and getattr(info.tokenizer, "chat_template", None)
        ):
            print("note: the model has a chat template that is not used; --chat_template model uses it")
        _predict_all(tasks, rows, expected, folder, info, run, device)
    finally:
        folder.close()
    where = "" if args.output_dir == settings.OUTPUT_DIR else f" --output_dir {args.output_dir}"
    script = Path(__file__).resolve().parents[2] / "eval_long_bench.py"
    print(f"score with: {sys.executable} {script} --model {path.name}{' --e' if args.e else ''}{where}")


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


def _settings(args: argparse.Namespace, info: models.ModelInfo, device: str) -> settings.Settings:
    pruned = args.mode != "dense"
    return settings.Settings(
        benchmark="longbench-e" if args.e else "longbench",
        model=info.path,
        model_fingerprint=info.fingerprint,
        max_length=models.resolve_max_length(info, args.max_length),
        mode=args.mode,
        k_sparsity=args.k_sparsity,
        v_sparsity=args.v_sparsity,
        group_size=args.group_size,
        k_rule=args.k_rule if pruned else None,
        v_rule=args.v_rule if pruned else None,
        residual_length=args.residual_length if pruned else None,
        backend=args.backend if pruned else None,
        chat_template=resolve_chat_template(args.chat_template, info.name, info.tokenizer),
        dtype=models.resolve_dtype(info, args.dtype, device),
        device=device.split(":")[0].replace("auto", "cuda"),
        batch_size=args.batch_size,
    )


def _environment() -> dict:
    import torch

    found = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    found["python"] = platform.python_version()
    for package in ("torch", "transformers", "mustafar", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _predict_all(
    tasks: list[Task],
    rows: dict[str, data.Rows],
    expected: dict[str, int],
    folder: store.RunFolder,
    info: models.ModelInfo,
    run: settings.Settings,
    device: str,
) -> None:
    import torch
    from tqdm import tqdm

    from .generation import Predictor

    predictor = None
    for task in tasks:
        file = folder.predictions(task.name)
        left = [index for index in range(expected[task.name]) if index not in file.done]
        done = expected[task.name] - len(left)
        if left and predictor is None:
            predictor = Predictor(models.load_model(info, run, device), run)
        with tqdm(total=expected[task.name], initial=done, desc=task.name, unit="row") as progress:
            for start in range(0, len(left), run.batch_size):
                batch = left[start : start + run.batch_size]
                chosen = [rows[task.name].rows[index] for index in batch]
                try:
                    answers = predictor.predict(task, chosen)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of memory at {task.name}, row {batch[0]}; the rows before it are kept. Lower "
                        f"--max_length or --batch_size, or use a larger GPU.\n{error}"
                    ) from None
                for index, row, answer in zip(batch, chosen, answers, strict=True):
                    file.append(_record(task, index, row, answer))
                    progress.update()
        file.close()


def _record(task: Task, index: int, row: dict, answer: str) -> dict:
    return {
        "pred": answer,
        "answers": row["answers"],
        "all_classes": row["all_classes"],
        "length": row["length"],
        "dataset": task.name,
        "_index": index,
    }
