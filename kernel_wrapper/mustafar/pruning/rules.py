"""The registry of pruning rules. When to prune is the cache's business, never a rule's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch

from mustafar.format import check_sparsity, num_kept
from mustafar.pruning.selection import keep_top

Score = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to keep of the keys or of the values.

    Attributes
    ----------
    name : str
        As given to `--k_rule` or `--v_rule`.
    tensor : {"K", "V"}
        Which of the two it prunes.
    score : callable
        ``score(x, window) -> Tensor``, larger = keep. `x` [B, Hkv, T, D] are the tokens to prune. `window` is
        what was observed of recent queries, None where the cache observes nothing. The result has the shape
        of `x`, or T = 1 for a structured rule, whose pattern all tokens share.
    dim : {"channel", "token"}
        What is ranked: the channels of a token, or the tokens of a group in a channel. See `keep_top`.
    uniform : bool
        Whether every token keeps the same number of channels; then the uniform layout holds it, which needs
        no offsets and no synchronisation. Otherwise the general layout does.
    """

    name: str
    tensor: Literal["K", "V"]
    score: Score
    dim: Literal["channel", "token"] = "channel"
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.tensor not in ("K", "V"):
            raise ValueError(f"rule {self.name}: tensor must be 'K' or 'V', got {self.tensor!r}")
        if self.dim not in ("channel", "token"):
            raise ValueError(f"rule {self.name}: dim must be 'channel' or 'token', got {self.dim!r}")
        if self.uniform and self.dim != "channel":
            raise ValueError(
                f"rule {self.name}: only a rule that ranks channels keeps equally many per token"
            )

    @property
    def fused(self) -> bool:
        """Whether `ops.prune_compress` selects exactly what this rule does, in its one pass."""
        return self.uniform and self.score is magnitude


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A rule with its parameters: all that is needed to prune keys or values.

    Attributes
    ----------
    rule : Rule
    sparsity : float
        Fraction pruned, 0 <= sparsity < 1.
    group_size : int
        Tokens ranked together by rules that rank tokens.
    """

    rule: Rule
    sparsity: float
    group_size: int = 32

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, f"{self.rule.tensor.lower()}_sparsity")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(
                f"group_size is a number of tokens and must be a positive int, got {self.group_size!r}"
            )

    def kept(self, head_dim: int) -> int:
        """Channels that a token keeps under a uniform rule."""
        return num_kept(self.sparsity, head_dim)

    def prune(self, x: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of x [B, Hkv, T, D] with zeros where the rule prunes. Groups count from the first token of
        x."""
        keep = keep_top(self.rule.score(x, window), self.sparsity, self.rule.dim, self.group_size)
        return torch.where(keep, x, 0)


def magnitude(x: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
    """|x|, the score of the paper's per-token magnitude pruning (section 3.2)."""
    return x.abs()


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("Kt_Mag", "K", magnitude, uniform=True),
        Rule("Vt_Mag", "V", magnitude, uniform=True),
    )
}


def get_rule(name: str, tensor: str | None = None) -> Rule:
    """The rule called `name`; with `tensor` ("K" or "V") only if it prunes that.

    Raises
    ------
    ValueError
        Listing the valid names.
    """
    valid = [rule.name for rule in RULES.values() if tensor in (None, rule.tensor)]
    option = {None: "rule", "K": "k_rule", "V": "v_rule"}[tensor]
    rule = RULES.get(name)
    if rule is None:
        raise ValueError(f"unknown {option} {name!r}; valid: {', '.join(valid)}")
    if tensor not in (None, rule.tensor):
        prunes = {"K": "keys", "V": "values"}[rule.tensor]
        raise ValueError(f"{option} {name!r} prunes {prunes} ({rule.tensor}); valid: {', '.join(valid)}")
    return rule
