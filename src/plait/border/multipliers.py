"""What may multiply an update: weights, scales and alphas, and the range in which they mean something."""

from __future__ import annotations

from plait.border.checked import shown
from plait.errors import UsageError

# The sizes of what multiplies an update and is not 0. Up to the first, squares of usual updates, which norms and Gram matrices add up,
# stay far inside float32; down to the second their numbers keep all digits. A weight may be a count of rows or tokens, where a method
# takes the mean.
LARGEST, SMALLEST = 1e12, 1e-12
EXPECTED = f"expected 0 or a number from {SMALLEST:g} to {LARGEST:g} in size"


def is_multiplier(value: object) -> bool:
    """Whether something may multiply an update: 0, or a number of either sign in the range.

    >>> [is_multiplier(v) for v in (0, -1.5, 1e12, 1e13, 1e-13, float("nan"), True, "1")]
    [True, True, True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def checked_multiplier(value: object, what: str) -> float:
    """Take a weight or a scale.

    Args:
        value: Whatever was given.
        what: Names it in the message, such as "scale".

    Raises:
        UsageError: It is no number, or out of range.
    """
    if not isinstance(value, int | float) or not is_multiplier(value):
        raise UsageError(f"{what} is {shown(value)}, {EXPECTED}")
    return float(value)
