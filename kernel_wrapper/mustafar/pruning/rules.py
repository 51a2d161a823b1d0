"""The registry of pruning rules. When to prune is the cache's business, never a rule's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch

from mustafar.format import check_sparsity, num_kept
from mustafar.pruning.observed import Observed
from mustafar.pruning.selection import keep_top

Score = Callable[[torch.Tensor, Observed | None], torch.Tensor]


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
        ``score(x, window) -> Tensor``, larger = keep. `x` [B, Hkv, T, D] are the tokens to prune. `window`,
        an `Observed`, is what recent queries show of them, None unless the rule `observes`. The result has
        the shape of `x`, or T = 1 for a structured rule, whose pattern all tokens share.
    dim : {"channel", "token"}
        What is ranked: the channels of a token, or the tokens of a group in a channel. See `keep_top`.
    uniform : bool
        Whether every token keeps the same number of channels; then the uniform layout holds it, which needs
        no offsets and no synchronisation. Otherwise the general layout does.
    observes : bool
        Whether the score needs `window`. The cache then remembers the queries of the last tokens, which takes
        attention to be computed by the "mustafar" function, in the simulated cache too.
    """

    name: str
    tensor: Literal["K", "V"]
    score: Score
    dim: Literal["channel", "token"] = "channel"
    uniform: bool = False
    observes: bool = False

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

    def prune(self, x: torch.Tensor, window: Observed | None = None) -> torch.Tensor:
        """A copy of x [B, Hkv, T, D] with zeros where the rule prunes. Groups count from the first token of
        x.

        Raises
        ------
        ValueError
            If the rule observes and no `window` is given.
        """
        if self.rule.observes and window is None:
            alone = ", ".join(
                r.name for r in RULES.values() if r.tensor == self.rule.tensor and not r.observes
            )
            raise ValueError(
                f"rule {self.rule.name} scores by recent queries, which only a cache observes; "
                f"rules that need none: {alone}"
            )
        keep = keep_top(self.rule.score(x, window), self.sparsity, self.rule.dim, self.group_size)
        return torch.where(keep, x, 0)


def magnitude(x: torch.Tensor, window: Observed | None = None) -> torch.Tensor:
    """|x|, the score of magnitude pruning, per token or per channel (paper section 3)."""
    return x.abs()


def query_aware(x: torch.Tensor, window: Observed) -> torch.Tensor:
    """|K| x sum of |Q| over the last 32 queries and the heads of the group (paper section 3, output-aware
    pruning of keys): how much each product of q . k can move the attention score."""
    return x.abs() * window.grouped_queries().abs().sum((2, 3)).unsqueeze(2)


def attention_aware(x: torch.Tensor, window: Observed) -> torch.Tensor:
    """|V| x attention that its token gets from the last 32 queries, summed over them and the heads of the
    group (paper section 3, output-aware pruning of values)."""
    return x.abs() * window.attention()


def think(x: torch.Tensor, window: Observed) -> torch.Tensor:
    """|| Q_j K_j^T ||_F = ||Q_j|| ||K_j|| of each channel j, Q the last 32 queries of the group's heads, one
    above the other, K the tokens pruned together, padding left out (ThinK, arXiv 2407.21018, section 3.2).

    Squared, which ranks the same. Whole channels are kept, chosen anew each time the cache prunes.
    """
    return window.grouped_queries().square().sum((2, 3)).unsqueeze(2) * _channel_squares(x, window)


def thinv(x: torch.Tensor, window: Observed) -> torch.Tensor:
    """||V_j|| of each channel j over the tokens pruned together, padding left out (squared).

    The paper's baseline for values: ThinK's whole channels, by magnitude alone, as its released code has it.
    """
    return _channel_squares(x, window)


def _channel_squares(x: torch.Tensor, window: Observed) -> torch.Tensor:
    """Sum over tokens of x squared, float32 [B, Hkv, 1, D]."""
    return torch.where(window.is_token(), x, 0).float().square().sum(dim=2, keepdim=True)


# Vt_Opt is magnitude: within a token all values share one positive weight, its attention, so that |V| ranks
# them (paper section 3). Multiplying it in could only lose that order to rounding. A structured rule keeps
# equally many channels of every token, so it is uniform.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("Kt_Mag", "K", magnitude, uniform=True),
        Rule("Kt_Opt", "K", query_aware, uniform=True, observes=True),
        Rule("ThinK", "K", think, uniform=True, observes=True),
        Rule("Vt_Mag", "V", magnitude, uniform=True),
        Rule("Vt_Opt", "V", magnitude, uniform=True),
        Rule("Vc_Mag", "V", magnitude, dim="token"),
        Rule("Vc_Opt", "V", attention_aware, dim="token", observes=True),
        Rule("ThinV", "V", thinv, uniform=True, observes=True),
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
