"""DELLA: drop entries at random, small ones more often, rescale the others, then elect signs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.errors import UsageError
from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space, signed_mean
from plait.merging.entries.random_masks import LEVELS, Place, draw, draw_for, ones_where
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Density, Fraction, Space


@merge_method("della", paper="arXiv:2406.11617")
def della(x: MergeInputs, *, density: Density = 0.5, epsilon: Fraction = 0.2, space: Space = "dense") -> MergedDelta:
    """MagPrune, then TIES' election: row by row, an entry's chance to stay rises with its magnitude's rank.

    In each row of n entries the k-th smallest magnitude (k = 0 .. n-1) is kept with probability
    density - epsilon/2 + epsilon k / (n - 1), and divided by it; then signs are elected and those that agree averaged.

    Args:
        x: The module.
        density: Mean probability to keep an entry.
        epsilon: Width of the window of probabilities around it.
        space: Whose rows are meant: of the dense deltas (the paper), of the cores in their SVD basis, or of KnOTS' S V^T.

    Raises:
        UsageError: The window leaves (0, 1].

    Cost: one sort of every row, in row blocks.
    Source: Deep et al., 2024, section 3 (drop probabilities p = 1 - density).
    **Deviates**: probabilities in steps of 2^-16; masks follow the adapter's content, as in `dare_linear`.
    """
    if density - epsilon / 2 <= 0 or density + epsilon / 2 > 1:
        raise UsageError(
            f"della keeps entries with probability {density - epsilon / 2:g} to {density + epsilon / 2:g}, outside (0, 1]",
            hint="a smaller epsilon, or a density nearer the middle",
        )

    def pruned(parts: Iterable[Tensor], place: Place) -> Iterator[Tensor]:
        for task, part in enumerate(parts):
            yield mag_prune(x, task, part, place, density, epsilon) if x.ranks[task] else part

    return in_space(x, lambda parts, place: signed_mean(pruned(parts, place), x.weights), space)


def mag_prune(
    x: MergeInputs, task: int, part: Tensor, place: Place, density: float, epsilon: float, *, divided: bool = True
) -> Tensor:
    """Drop entries of one task's rows, small ones more often; what stays is `divided` by its probability."""
    n = part.shape[1]
    ramp = np.linspace(density - epsilon / 2, density + epsilon / 2, n) if n > 1 else np.array([density])
    steps = np.maximum(1, np.rint(ramp * LEVELS)).astype(np.int32)
    if part.is_cuda:
        levels = levels_of(part, torch.from_numpy(steps).to(part.device))
        part.mul_(draw_for(x, task, place, part) < levels)
    else:
        order = ascending(part.abs().numpy())
        by_entry = np.empty(part.shape, dtype=np.int32)
        np.put_along_axis(by_entry, order, np.broadcast_to(steps, part.shape), axis=1)
        part *= ones_where(draw(x, task, place, tuple(part.shape)) < by_entry, part)
        levels = torch.from_numpy(by_entry)
    return part.mul_(LEVELS).div_(levels.to(part.dtype)) if divided else part


def levels_of(part: Tensor, steps: Tensor) -> Tensor:
    """The step of every entry by the rank of its magnitude in its row, as `ascending` ranks them, where the part is.

    Args:
        part: (rows, n).
        steps: (n,), of the smallest magnitude first.
    """
    order = part.abs().sort(dim=1, stable=True).indices
    return torch.empty(part.shape, dtype=steps.dtype, device=part.device).scatter_(1, order, steps.expand(part.shape))


def ascending(
    magnitudes: np.ndarray[tuple[int, ...], np.dtype[Any]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Rank the columns of each row in ascending order, the first of equals first.

    float32 magnitudes order as their bits do; sorted as integers with the column below them, they are four times faster.

    Args:
        magnitudes: Numbers of rows, none negative or NaN.
    """
    if magnitudes.dtype != np.float32:
        return magnitudes.argsort(axis=1, kind="stable")
    keys = magnitudes.view(np.int32).astype(np.int64) << 32 | np.arange(magnitudes.shape[1])
    return np.sort(keys, axis=1) & 0xFFFFFFFF
