"""A prediction run, whatever the benchmark: its settings, its environment, and row after row into its folder."""

from __future__ import annotations

import argparse
import array
import contextlib
import datetime
import itertools
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import models
from .chat import resolve_chat_template
from .errors import UserError
from .generation import Generator
from .options import Settings
from .store import RunFolder


@dataclass(frozen=True)
class Job:
    """The rows of one data set that a run predicts.

    Attributes
    ----------
    name
        The data set; its predictions are in `<name>.jsonl`.
    task
        What the predictor is told about the data set.
    expected
        Number of rows; they are asked for as 0 to expected - 1.
    row
        Index -> the row, whose `ids` are its prompt. Called for the rows that are not yet predicted only.
    record
        (index, row, answer) -> the line that is kept; `_index` must be the index.
    """

    name: str
    task: Any
    expected: int
    row: Callable[[int], dict]
    record: Callable[[int, dict, str], dict]


def command(run: Callable[[], None]) -> int:
    """Run a command line; return its exit status (2 after a message about what to put right)."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    return 0


def make_settings(
    args: argparse.Namespace, info: models.ModelInfo, device: str, *, benchmark: str, max_length: int | None
) -> Settings:
    """Return the settings that the options come to for a model on a device.

    Raises
    ------
    UserError
        If the kernels of that device cannot run the model.
    """
    pruned = args.mode != "dense"
    settings = Settings(
        benchmark=benchmark,
        model=info.path,
        model_fingerprint=info.fingerprint,
        max_length=max_length,
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
    models.check_kernels(info, settings)
    return settings


def environment() -> dict:
    """Return versions, GPU and date, for the reader of a config.json."""
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


def remembered(make: Callable[[int], dict], memory: dict | None, *key: Any) -> Callable[[int], dict]:
    """`make`, which makes a row of an index; with a `memory`, each row of one `key` once."""
    if memory is None:
        return make
    made = memory.setdefault(key, {})

    def row(index: int) -> dict:
        if index not in made:
            found = make(index)
            made[index] = found | {
                "ids": array.array("i", found["ids"])
            }  # a list takes nine times the memory
        return made[index]

    return row


def predict_all(
    jobs: list[Job],
    folder: RunFolder,
    load: Callable[[], models.LoadedModel],
    *,
    batch_size: int,
    advice: str,
) -> None:
    """Predict the rows that the folder does not hold yet.

    Parameters
    ----------
    jobs
        The data sets, in order.
    folder
        Where the predictions go.
    load
        Loads the model: called once, and not at all if nothing is left to do.
    batch_size
        Rows for each call of `predict`.
    advice
        What to do when the memory does not suffice.

    Raises
    ------
    UserError
        If the device's memory or the disk does not suffice.
    """
    import torch
    from tqdm import tqdm

    shard = folder.shard
    predictor = None
    for job in jobs:
        done = folder.done(job.name)
        mine = [index for index in range(job.expected) if shard.takes(index, batch_size)]
        left = [index for index in mine if index not in done]
        if not left and shard.world > 1:
            continue
        if left and predictor is None:
            predictor = Generator(load())
        name = job.name if shard.world == 1 else f"{job.name} [{shard.rank}]"
        with (
            contextlib.closing(folder.predictions(job.name)) as file,
            tqdm(total=len(mine), initial=len(mine) - len(left), desc=name, unit="row") as progress,
        ):
            # Rows of a batch are the same in a run that was resumed, so that their answers are.
            for _, group in itertools.groupby(left, lambda index: index // batch_size):
                batch = list(group)
                rows = [job.row(index) for index in batch]
                try:
                    answers = predictor.predict(job.task, rows)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of memory at {job.name}, row {batch[0]}; the rows before it are kept. "
                        f"{advice}\n{error}"
                    ) from None
                except (
                    NotImplementedError
                ) as error:  # what a model asks of attention shows when it computes it
                    raise UserError(f"the model cannot run with this cache: {error}") from error
                size = {} if predictor.kv_bytes is None else {"_kv_bytes": list(predictor.kv_bytes)}
                file.append(*(job.record(*made) | size for made in zip(batch, rows, answers, strict=True)))
                progress.update(len(batch))
    missing = folder.join()
    if missing and shard.world > 1:
        print(
            f"process {shard.rank} of {shard.world} is done; the others have rows of {', '.join(missing)} left (the "
            "last one joins the files; if one was ended, the same command makes what is missing)"
        )
