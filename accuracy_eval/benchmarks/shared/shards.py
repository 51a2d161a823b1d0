"""Which rows of a run a process takes, where torchrun (or srun, or a shell loop) started several.

Batch n goes to process n mod world, so that every batch is the one that a single process would make, and with
it every answer. The processes do not talk to one another: each keeps its rows in a file of its own, and whichever
comes last joins them. A process that dies holds up no other, and its rows are made by the next run of the command.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`; `local` is its number on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"{self.rank}of{self.world}"

    def takes(self, index: int, batch_size: int) -> bool:
        """Return whether the row of an index is this process's."""
        return index // batch_size % self.world == self.rank

    def device(self, given: str | None) -> str | None:
        """Return the option `--device` for this process: with one GPU each, that of its number.

        Raises
        ------
        UserError
            If there are fewer GPUs than processes, or one model is to be spread over all of them.
        """
        import torch

        if self.world == 1:
            return given
        if given == "auto":
            raise UserError(
                "--device auto spreads one model over all GPUs, and several processes were started to share the "
                "rows; start one process, or leave --device out"
            )
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if given not in (None, "cuda") or (given is None and not gpus):
            return given
        if self.local >= gpus:
            raise UserError(
                f"process {self.local} of this machine has no GPU of its own, there are {gpus}; start as many "
                f"processes (torchrun --nproc_per_node={max(1, gpus)}), or give --device"
            )
        return f"cuda:{self.local}"


def current() -> Shard:
    """Return this process's share of a run, from the environment that torchrun makes.

    Raises
    ------
    UserError
        If RANK and WORLD_SIZE are not numbers of which the first is the smaller.
    """
    world = os.environ.get("WORLD_SIZE")
    rank = os.environ.get("RANK", "0" if world == "1" else None)
    if world is None:
        return Shard()
    try:
        shard = Shard(int(rank or ""), int(world), int(os.environ.get("LOCAL_RANK") or rank or ""))
    except ValueError:
        shard = Shard(0, 0)
    if not 0 <= shard.rank < shard.world:
        raise UserError(
            f"WORLD_SIZE={world} and RANK={rank} in the environment: RANK must be from 0 to WORLD_SIZE - 1; "
            "start several processes with torchrun, or unset both"
        )
    return shard
