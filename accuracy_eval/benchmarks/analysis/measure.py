"""Magnitudes of keys and values by channel, and the error that pruning makes in a layer's attention output."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from mustafar.pruning import OBSERVED_QUERIES, Observed, Pruning, get_rule

from .capture import Layer

#: Queries that errors are measured on: the prompt's last. Rules do not see them.
HELD_OUT = 32
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Case:
    """One way to prune: a rule of None leaves keys (values) as they are."""

    k_rule: str | None
    k_sparsity: float
    v_rule: str | None
    v_sparsity: float

    @property
    def label(self) -> str:
        return " + ".join(rule for rule in (self.k_rule, self.v_rule) if rule)


def cases(k_rules: list[str], v_rules: list[str], sparsities: list[float]) -> list[Case]:
    """Return every rule alone at every sparsity, then the first of each together."""
    found = [Case(rule, sparsity, None, 0.0) for rule, sparsity in itertools.product(k_rules, sparsities)]
    found += [Case(None, 0.0, rule, sparsity) for rule, sparsity in itertools.product(v_rules, sparsities)]
    if k_rules and v_rules:
        found += [Case(k_rules[0], sparsity, v_rules[0], sparsity) for sparsity in sparsities]
    return found


@dataclass(frozen=True)
class Magnitudes:
    """|x| by head and channel over the tokens: mean and quantiles, each [Hkv, D]."""

    mean: torch.Tensor
    quantiles: torch.Tensor  # [len(QUANTILES), Hkv, D]

    def peak(self) -> float:
        """How much the largest channel stands out: its mean over the median channel's, averaged over heads."""
        return float((self.mean.amax(-1) / self.mean.median(-1).values).mean())


def magnitudes(x: torch.Tensor) -> Magnitudes:
    """Return the magnitudes of keys or values [Hkv, T, D]."""
    x = x.float().abs()
    ordered = x.sort(dim=1).values  # torch.quantile takes 16 M elements at most
    at = [round(q * (x.shape[1] - 1)) for q in QUANTILES]
    return Magnitudes(x.mean(1).cpu(), torch.stack([ordered[:, i] for i in at]).cpu())


class PrunedLayer:
    """A layer as a cache would hold it when its prompt ended `HELD_OUT` tokens earlier.

    Tokens before the last `residual_length` of that prompt are pruned; output-aware rules see its last queries.
    """

    def __init__(self, layer: Layer, residual_length: int, group_size: int) -> None:
        self.layer, self.group_size = layer, group_size
        self.prompt = layer.keys.shape[1] - HELD_OUT
        self.pruned = max(0, self.prompt - residual_length)
        self.queries = layer.queries[:, -HELD_OUT:].float()
        self.dense = self._attend(layer.keys, layer.values)

    def pattern(self, rule: str, sparsity: float) -> torch.Tensor:
        """Return the keys or values [Hkv, T, D] with zeros where the rule prunes."""
        tensor = get_rule(rule).tensor
        x = self.layer.keys if tensor == "K" else self.layer.values
        keys = self.layer.keys[None, :, : self.prompt]
        window = Observed(
            queries=self.layer.queries[None, :, :-HELD_OUT][:, :, -OBSERVED_QUERIES:],
            kv_heads=keys.shape[1],
            keys=lambda: keys,
            tokens=self.prompt,
            first=0,
            last=self.pruned,
            starts=None,
            scaling=self.layer.scaling,
            sliding_window=self.layer.sliding_window,
        )
        pruned = Pruning(get_rule(rule), sparsity, self.group_size).prune(x[None, :, : self.pruned], window)
        return torch.cat([pruned[0], x[:, self.pruned :]], dim=1)

    def error(self, case: Case) -> float:
        """Return ||O' - O|| / ||O|| over the held-out queries of all heads, O the dense attention output."""
        keys = self.pattern(case.k_rule, case.k_sparsity) if case.k_rule else self.layer.keys
        values = self.pattern(case.v_rule, case.v_sparsity) if case.v_rule else self.layer.values
        return float((self._attend(keys, values) - self.dense).norm() / self.dense.norm())

    def _attend(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention output [Hkv, G, n, D] of the held-out queries, float32."""
        tokens = keys.shape[1]
        position = torch.arange(tokens, device=keys.device)
        own = position[-HELD_OUT:, None]
        visible = position <= own
        if self.layer.sliding_window:
            visible &= position > own - self.layer.sliding_window
        queries = self.queries.unflatten(0, (keys.shape[0], -1))
        scores = queries @ keys.float().unsqueeze(1).transpose(-1, -2) * self.layer.scaling
        return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values.float().unsqueeze(1)
