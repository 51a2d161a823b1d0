"""95 % intervals of scores, and of their differences on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .runs import Run

RESAMPLES = 2000
_Z = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A score in percent with its interval."""

    score: float
    low: float
    high: float


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in [0, 1]."""
    share = successes / trials
    z2 = _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


class Resampled:
    """Means of resampled rows, by run and data set; the resamples are the same rows in every run.

    So differences between two runs are those of pairs: a row that both answer alike adds nothing to them.
    """

    def __init__(self, runs: list[Run], names: list[str], seed: int = 0) -> None:
        self._means: dict[tuple[str, str], np.ndarray] = {}
        self._scores = {(run.label, name): run.scores[name] for run in runs for name in names}
        for number, name in enumerate(names):
            rng = np.random.default_rng([seed, number])
            rows = len(runs[0].scores[name])
            picked = rng.integers(rows, size=(RESAMPLES, rows))
            for run in runs:
                self._means[run.label, name] = run.scores[name][picked].mean(1)

    def mean(self, run: Run, names: list[str]) -> Estimate:
        """Return the mean over data sets: Wilson's interval for one of right and wrong answers, else bootstrap."""
        score = float(np.mean([self._scores[run.label, name].mean() for name in names]))
        if len(names) == 1:
            rows = self._scores[run.label, names[0]]
            if np.isin(rows, (0.0, 1.0)).all():
                low, high = wilson(float(rows.sum()), len(rows))
                return Estimate(100 * score, 100 * low, 100 * high)
        return _estimate(score, np.mean([self._means[run.label, name] for name in names], 0))

    def difference(self, run: Run, base: Run, names: list[str]) -> Estimate:
        """Return how much higher `run` scores than `base`, in points, with the bootstrap's interval."""
        scores, means = (
            np.mean([of[run.label, name] - of[base.label, name] for name in names], 0)
            for of in ({key: rows.mean() for key, rows in self._scores.items()}, self._means)
        )
        return _estimate(float(scores), means)


def _estimate(score: float, means: np.ndarray) -> Estimate:
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(100 * score, 100 * float(low), 100 * float(high))
