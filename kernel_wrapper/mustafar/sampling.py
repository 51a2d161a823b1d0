"""How a decoder picks the next token: what may be drawn, and the largest of many scores."""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw tokens; with the same seed a decoder draws the same, captured or not.

    Attributes
    ----------
    temperature : float
        Of the softmax, above 0.
    top_k : int
        Only the `top_k` most likely tokens; 0 for all.
    top_p : float
        Only the most likely tokens that together reach this probability; 1 for all.
    seed : int
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature!r}; for greedy search leave sampling out"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is a number of tokens, 0 for all, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Log probabilities, up to a constant, of what may be drawn; -inf elsewhere."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            likely = ordered.softmax(-1)
            out = likely.cumsum(-1) - likely >= self.top_p  # what comes before reaches top_p already
            scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
        return scores


def largest(scores: torch.Tensor) -> torch.Tensor:
    """``scores.argmax(-1)`` of [B, vocabulary], in two steps: a GPU gives few rows to few of its processors."""
    batch, vocabulary = scores.shape
    pieces = math.gcd(vocabulary, 256)
    if pieces < 16 or vocabulary < 8192:
        return scores.argmax(-1)
    values, places = scores.view(batch, pieces, -1).max(-1)
    piece = values.argmax(-1, keepdim=True)
    return (places.gather(1, piece) + piece * (vocabulary // pieces))[:, 0]
