"""What weights mean to methods whose merged delta is a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plait.errors import UsageError

Combination = Callable[[Sequence[float]], Sequence[float]]  # weights -> the factor of each delta


def as_given(weights: Sequence[float]) -> Sequence[float]:
    """The weights themselves."""
    return weights


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        UsageError: They sum to zero (to within rounding), so no mean is defined.
    """
    total = sum(weights)
    if abs(total) <= 1e-12 * sum(abs(w) for w in weights):
        raise UsageError(
            f"the weights {list(weights)} sum to zero, so they cannot be normalised",
            hint="task_arithmetic takes the weights as they are",
        )
    return [w / total for w in weights]
