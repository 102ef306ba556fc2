"""Which validation rows do what: some only choose learning rates, the rest are two halves that swap roles."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
HALVES = ("A", "B")


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one task.

    Args:
        tuning: Seen by the sweep alone.
        halves: "A" and "B": what is chosen on one is reported on the other.
        grid: The first rows of each half, from which scales are chosen (a part, for cost).
    """

    tuning: Rows
    halves: Mapping[str, Rows]
    grid: Mapping[str, Rows]


def split_rows(n: int, *, seed: int, tuning_rows: int, grid_rows: int) -> Split:
    """Split n rows by a permutation that depends on the seed alone.

    Args:
        n: Rows of a task's validation set, at least 5.
        seed: Seed of the split, one for the whole study.
        tuning_rows: Rows for the sweep; a fifth of all at most.
        grid_rows: Rows of a half that scales are chosen from, at most.

    Returns:
        Positions, each part ascending; tuning and the halves are disjoint and cover all rows.
    """
    order = np.random.default_rng([seed, n]).permutation(n)
    cut = min(tuning_rows, n // 5)
    middle = cut + (n - cut) // 2
    parts = {"A": order[cut:middle], "B": order[middle:]}
    return Split(
        np.sort(order[:cut]),
        {k: np.sort(v) for k, v in parts.items()},
        {k: np.sort(v[:grid_rows]) for k, v in parts.items()},
    )


def joined(parts: Sequence[Rows]) -> tuple[Rows, list[slice]]:
    """Several parts in one array, so that one pass scores them, and where each of them is."""
    ends = np.cumsum([0, *(len(p) for p in parts)])
    return np.concatenate(parts), [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
