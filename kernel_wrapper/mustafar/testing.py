"""How close is close enough: the tolerance that the tests and kernel_evaluation.py share."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Largest absolute errors against float32: the op's, PyTorch's in the same dtype, and one rounding."""

    error: float
    peer: float
    floor: float

    @property
    def ok(self) -> bool:
        """At most twice PyTorch's own error, with the floor for the times when PyTorch is exact by chance."""
        return self.error <= 2 * self.peer + self.floor

    def __str__(self) -> str:
        return f"error {self.error:.3g}, PyTorch's {self.peer:.3g}, one rounding {self.floor:.3g}"


def accuracy(got: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> Accuracy:
    """Compare `got` and PyTorch's `same_dtype` result with `exact` (float32); NaN anywhere is an infinite error."""
    exact = exact.float()
    if not exact.numel():
        return Accuracy(0.0, 0.0, 0.0)

    def largest(x: torch.Tensor) -> float:
        return float((x.to(exact.device).float() - exact).abs().nan_to_num(nan=torch.inf).max())

    scale = float(exact.abs().max())
    # float32 against float32: sums in another order differ by the size of the terms, not of the result.
    floor = 1e-5 * max(scale, 1.0) if got.dtype == torch.float32 else scale * torch.finfo(got.dtype).eps
    return Accuracy(largest(got), largest(same_dtype), floor)
