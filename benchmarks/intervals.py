"""Means of differences and how far they may be off: one t interval for every page that quotes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval by Student's t.

    Args:
        n: Number of differences.
        mean: Their mean.
        low, high: The interval.
        p: Two-sided, of a mean of zero.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def t_interval(differences: Sequence[float] | np.ndarray) -> Interval:
    """Take the mean of two differences or more with its 95 % t interval; p is NaN where all are zero.

    >>> i = t_interval([1.0, 2.0, 3.0])
    >>> i.mean, round(i.low, 3), round(i.high, 3), round(i.p, 3)
    (2.0, -0.484, 4.484, 0.074)
    """
    off = np.asarray(differences, dtype=float)
    n, mean, spread = len(off), float(off.mean()), off.std(ddof=1)
    half = float(student.ppf(0.975, n - 1) * spread / n**0.5)
    with np.errstate(divide="ignore", invalid="ignore"):  # all alike: p 0, or NaN where all are zero
        p = float(2 * student.sf(abs(np.float64(mean)) / (spread / n**0.5), n - 1))
    return Interval(n, mean, mean - half, mean + half, p)
