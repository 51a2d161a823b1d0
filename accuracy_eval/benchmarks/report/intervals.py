"""95 % intervals of scores, and of their differences on the same rows, in closed form.

None of them shrinks to nothing where all rows are alike: 24 right answers of 24 leave room for a score below 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .runs import Run

_Z = 1.959964  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores, in percent with its interval."""

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


def mean_interval(rows: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores in [0, 1].

    Wilson's for right and wrong answers; for others the normal one after two rows of 0 and two of 1 were added,
    as Agresti and Coull do for shares.
    """
    if np.isin(rows, (0.0, 1.0)).all():
        return wilson(float(rows.sum()), len(rows))
    centre, half = _normal(np.append(rows, [0, 0, 1, 1]))
    return max(0.0, centre - half), min(1.0, centre + half)


def score(run: Run, names: list[str]) -> Estimate:
    """Return the mean over data sets of a run's scores, each data set counted alike.

    The intervals of the data sets are combined by Zou and Donner's method: distances to the bounds add in squares.
    """
    return _average([run.scores[name] for name in names])


def agreement(run: Run, base: Run, names: list[str]) -> Estimate:
    """Return the share of rows that `run` answers word for word as `base` does, each data set counted alike.

    It tells two ways of pruning apart before scores do: an answer may change from wrong to wrong, and as many may
    turn right as wrong.
    """
    pairs = [zip(run.answers[name], base.answers[name], strict=True) for name in names]
    return _average([np.array([float(mine == other) for mine, other in rows]) for rows in pairs])


def _average(sets: list[np.ndarray]) -> Estimate:
    """Return the mean of the means of rows in [0, 1]."""
    means = np.array([rows.mean() for rows in sets])
    bounds = np.array([mean_interval(rows) for rows in sets])
    mean = float(means.mean())
    below, above = (np.sqrt(((bounds.T - means) ** 2).sum(1)) / len(sets)).tolist()
    return Estimate(100 * mean, 100 * max(0.0, mean - below), 100 * min(1.0, mean + above))


def difference(run: Run, base: Run, names: list[str]) -> Estimate:
    """Return how much higher `run` scores than `base`, in points: pairs of the same rows.

    A row that both answer alike adds nothing. For each data set the interval is Agresti and Min's for matched pairs,
    half a row added to each of the four outcomes; it takes scores between right and wrong as well.
    """
    pairs = [run.scores[name] - base.scores[name] for name in names]
    found = np.array(
        [_normal(np.append(rows, [1, -1, 0, 0]), [1.0] * len(rows) + [0.5] * 4) for rows in pairs]
    )
    centre, half = float(found[:, 0].mean()), math.sqrt(float((found[:, 1] ** 2).sum())) / len(names)
    mean = float(np.mean([rows.mean() for rows in pairs]))
    low, high = min(mean, max(-1.0, centre - half)), max(mean, min(1.0, centre + half))
    return Estimate(100 * mean, 100 * low, 100 * high)


def _normal(rows: np.ndarray, weights: list[float] | None = None) -> tuple[float, float]:
    """Return the weighted mean and half the width of its normal interval."""
    mean = float(np.average(rows, weights=weights))
    variance = float(np.average((rows - mean) ** 2, weights=weights))
    count = len(rows) if weights is None else sum(weights)
    return mean, _Z * math.sqrt(variance / count)
