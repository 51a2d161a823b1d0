"""Command lines in processes that are killed: forked from one that has imported everything, in milliseconds."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

#: What a process imports before it can do anything; done once.
_PRELOAD = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "mustafar.cache",
    "matplotlib.pyplot",
    "benchmarks.longbench.evaluate",
    "benchmarks.longbench.predict",
    "benchmarks.sweep.command",
]


def kills() -> int:
    """Kills of each test: a few in the suite, MUSTAFAR_KILLS where that is set."""
    return int(os.environ.get("MUSTAFAR_KILLS", "8"))


@dataclass
class Ended:
    """How a process ended: its exit status, negative after a signal; what it printed; how long it took."""

    status: int
    printed: str
    seconds: float


class Commands:
    """Runs `module.main(argv)`, each time in a new process."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "printed.txt"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    def start(self, module: str, argv: list[str]) -> multiprocessing.Process:
        """Start one, with output to a file."""
        process = self._context.Process(target=_call, args=(module, argv, str(self._log)))
        process.start()
        return process

    def run(self, module: str, argv: list[str], kill_after: float | None = None) -> Ended:
        """Run one to its end, or kill it (SIGKILL) so many seconds after its start."""
        begin = time.monotonic()
        process = self.start(module, argv)
        process.join(kill_after)
        process.kill()
        process.join()
        return Ended(process.exitcode, self._log.read_text(), time.monotonic() - begin)


def _call(module: str, argv: list[str], log: str) -> None:
    import torch

    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = importlib.import_module(module).main(argv)
    sys.exit(status)


class Killer:
    """Kills runs of a command at random moments until `kills()` have died.

    Parameters
    ----------
    commands
        Runs them.
    seconds
        How long a run takes that nobody kills; the moments are spread over it.
    seed
        Of the moments.
    """

    def __init__(self, commands: Commands, seconds: float, seed: int = 0) -> None:
        self._commands = commands
        self._seconds = seconds
        self._pick = random.Random(seed)
        self.killed = 0

    def run(self, module: str, argv: list[str]) -> bool:
        """Run the command, perhaps killing it; return whether it came to its end."""
        if self.killed == kills():
            ended = self._commands.run(module, argv)
        else:
            ended = self._commands.run(module, argv, self._pick.uniform(0, self._seconds))
        assert ended.status in (0, -9), ended.printed
        self.killed += ended.status == -9
        return ended.status == 0
