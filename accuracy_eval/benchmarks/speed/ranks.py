"""Several GPUs under torchrun: each rank computes its share of the heads and of the MLPs.

A checkpoint is divided by transformers (`tp_plan="auto"`). A preset, whose weights are random, is made divided: each
rank makes a model with its share of the heads and of the MLP's width, and adds the ranks' partial sums where tensor
parallelism does, behind the output projections of attention and MLP. All ranks make the same weights, so that they
agree on every token; the sums are not those of one model, which speed and memory do not see. Embedding and output
head are whole on every rank.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from ..shared.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Attributes: `count`, and this process's `number` and `local` number on its node."""

    count: int = 1
    number: int = 0
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """What torchrun says; one rank without it."""
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        if names[0] not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    def device(self, given: str) -> str:
        """This rank's device, for what `--device` resolved to."""
        if self.count == 1 or not given.startswith("cuda"):
            return given
        if ":" in given:
            raise UserError(f"--device {given}: under torchrun each rank takes a GPU of its own; say cuda")
        if self.local >= torch.cuda.device_count():
            raise UserError(f"rank {self.number}: this node has {torch.cuda.device_count()} GPUs")
        return f"cuda:{self.local}"

    def connect(self, device: str) -> None:
        """Join the other ranks."""
        if self.count > 1 and not torch.distributed.is_initialized():
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
                # With its device, NCCL connects here and not at the first sum, which might be inside a capture.
                torch.distributed.init_process_group("nccl", device_id=torch.device(device))
            else:
                torch.distributed.init_process_group("gloo")

    def share(self, options: dict[str, Any]) -> dict[str, Any]:
        """A preset's config options, divided.

        Raises
        ------
        UserError
            If heads or the MLP's width do not divide.
        """
        if self.count == 1:
            return options
        shared = dict(options)
        shared.setdefault("head_dim", options["hidden_size"] // options["num_attention_heads"])
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if options[name] % self.count:
                raise UserError(f"{self.count} ranks: {name} is {options[name]}, which they do not divide")
            shared[name] = options[name] // self.count
        return shared

    def add_up(self, model: Any) -> None:
        """Let the ranks' partial results be added, in a model made from a share."""
        if self.count == 1:
            return

        def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            torch.distributed.all_reduce(output)
            return output

        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(add)
            layer.mlp.down_proj.register_forward_hook(add)
