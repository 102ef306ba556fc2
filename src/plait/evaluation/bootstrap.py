"""How sure a mean score is: a paired bootstrap over examples, all metrics vectorised over resamples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import UsageError
from plait.tasks.metrics import OPEN, TEXT_METRICS, open_score

Floats = npt.NDArray[np.float64]
_CONSTANT = 1e-12  # of a mean square: what subtracting the squared mean leaves of a constant


@dataclass(frozen=True, slots=True)
class Resamples:
    """Counts of how often each example of a task is drawn, one row a resample; shared by all arms, so they are paired."""

    counts: Mapping[str, Floats]

    @classmethod
    def draw(cls, sizes: Mapping[str, int], resamples: int = 400, seed: int = 0) -> Resamples:
        """Draw (resamples, n) multinomial counts for every task, each from its own generator.

        >>> Resamples.draw({"sst2": 3}, resamples=2).counts["sst2"].sum(1).tolist()
        [3.0, 3.0]
        """
        counts = {}
        for i, (task, n) in enumerate(sorted(sizes.items())):
            generator = np.random.default_rng([seed, i])
            counts[task] = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        return cls(counts)


def weighted_score(
    metrics: Sequence[str], predictions: npt.NDArray[Any], labels: npt.NDArray[Any], weights: Floats
) -> Floats:
    """Compute a task's score (mean of its metrics, percent) for every row of example weights.

    >>> logits, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0])
    >>> weighted_score(["accuracy"], logits, labels, np.array([[1.0, 1.0], [2.0, 0.0]])).tolist()
    [50.0, 100.0]

    Args:
        metrics: Names in `plait.tasks.metrics`.
        predictions: (n, classes) logits or (n, 1) values.
        labels: (n,).
        weights: (resamples, n), non-negative.

    Returns:
        (resamples,). Spearman keeps the ranks of the whole sample instead of ranking each resample anew.
    """
    scores: Floats = np.mean([_weighted(m, predictions, labels, weights) for m in metrics], axis=0)
    return scores


def _weighted(metric: str, predictions: npt.NDArray[Any], labels: npt.NDArray[Any], W: Floats) -> Floats:
    if metric in ("pearson", "spearman"):
        from scipy.stats import rankdata

        x, y = predictions.reshape(len(labels)).astype(np.float64), labels.astype(np.float64)
        if np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())):
            return np.zeros(len(W))
        if metric == "spearman":
            x, y = rankdata(x), rankdata(y)
        return 100.0 * _correlation(x, y, W)
    if metric in TEXT_METRICS and (labels == OPEN).all():
        return open_score(metric, predictions, W)
    predicted = predictions.argmax(-1)
    if metric in ("accuracy", "exact_match"):
        hits: Floats = W @ (predicted == labels).astype(np.float64)
        accuracy: Floats = 100.0 * hits / W.sum(1)  # in this order: in the published tables the last bit breaks ties
        return accuracy
    classes = np.arange(
        max(predictions.shape[1], int(labels.max()) + 1, 2)
    )  # "f1" is class 1's, also where nobody says it
    hot_p, hot_y = (predicted[:, None] == classes).astype(np.float64), (labels[:, None] == classes).astype(np.float64)
    both, said, true = W @ (hot_p * hot_y), W @ hot_p, W @ hot_y
    if metric == "f1":
        return 100.0 * _ratio(2 * both[:, 1], said[:, 1] + true[:, 1])
    if metric == "f1_macro":
        met = said + true > 0  # as scikit-learn: classes that neither occur nor are predicted do not count
        f1: Floats = _ratio(2 * both, said + true) * met
        macro: Floats = 100.0 * f1.sum(1) / met.sum(1)
        return macro
    if metric == "matthews":
        n = W.sum(1)
        covariance = both.sum(1) * n - (said * true).sum(1)
        spread = (n**2 - (said**2).sum(1)) * (n**2 - (true**2).sum(1))
        return 100.0 * _ratio(covariance, np.sqrt(np.maximum(spread, 0.0)))
    raise UsageError(f"no bootstrap for metric {metric!r}")


def _correlation(x: Floats, y: Floats, W: Floats) -> Floats:
    """Weighted correlations; 0 where one of the two is constant among the rows that are drawn, but for rounding."""
    x, y = x - x.mean(), y - y.mean()
    n = W.sum(1)
    mx, my = W @ x / n, W @ y / n
    covariance = W @ (x * y) / n - mx * my
    spread = np.sqrt(_variance(x, mx, W) * _variance(y, my, W))
    return np.clip(_ratio(covariance, spread), -1.0, 1.0)


def _variance(x: Floats, means: Floats, W: Floats) -> Floats:
    squares: Floats = W @ x**2 / W.sum(1)
    left = squares - means**2
    return np.where(left > _CONSTANT * squares, left, 0.0)


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
