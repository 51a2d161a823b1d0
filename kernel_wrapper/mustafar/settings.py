"""What all layers of a cache share: their settings, and which backend they use."""

from __future__ import annotations

import dataclasses

import torch

from mustafar import crossover
from mustafar.format import SLICE_TOKENS
from mustafar.pruning import Pruning


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """What all layers of a cache share.

    Attributes
    ----------
    keys, values : Pruning
    residual_length : int
        The most recent tokens that stay dense when older ones are pruned.
    flush_every : int
        Tokens that gather beyond `residual_length` before they are pruned.
    backend : {"kernel", "simulate", "auto"}
        Decode on the compressed form; return dense tensors with zeros at every step; whichever is faster.
    check : bool
        Raise on NaN and on attention masks that are not left padding, at the price of a synchronisation.
    """

    keys: Pruning
    values: Pruning
    residual_length: int
    flush_every: int
    backend: str
    check: bool

    @property
    def observes(self) -> bool:
        """Whether a rule scores by recent queries."""
        return self.keys.rule.observes or self.values.rule.observes

    @property
    def window_capacity(self) -> int:
        """Window slots that decoding needs: up to 63 pruned tokens may wait for their slice to fill."""
        return self.residual_length + self.flush_every + SLICE_TOKENS - 1


class BackendChoice:
    """The backend of all dynamic layers of a cache. "auto" is decided by the first prompt, until a reset.

    Attributes
    ----------
    made : {"kernel", "simulate", "auto"}
        "auto" while there was no prompt to decide by.
    """

    def __init__(self, settings: CacheSettings, group: int) -> None:
        self.settings = settings
        self.group = group  # query heads per KV head
        self.made = settings.backend

    def make(self, keys: torch.Tensor) -> str:
        """The choice; keys [B, Hkv, T, D], the first that the cache sees, make it."""
        if self.made == "auto":
            batch, heads, tokens, head_dim = keys.shape
            rules = self.settings.keys, self.settings.values
            sparsity = sum(rule.sparsity for rule in rules) / 2
            self.made = "kernel"  # of the general layout nothing was measured
            if all(pruning.rule.uniform for pruning in rules):
                self.made = crossover.faster_backend(
                    keys.device, batch, heads * self.group, heads, tokens, head_dim, sparsity
                )
        return self.made

    def forget(self) -> None:
        self.made = self.settings.backend
