"""Model Breadcrumbs: drop the smallest entries and the largest, add up the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from plait.errors import UsageError
from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space, keep_from, weighted_sum
from plait.merging.entries.quantile import magnitude_thresholds, magnitudes_at
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Density, Fraction, Space


@merge_method("breadcrumbs", paper="arXiv:2312.06795")
def breadcrumbs(
    x: MergeInputs, *, density: Density = 0.8, gamma: Fraction = 0.01, space: Space = "dense"
) -> MergedDelta:
    """Per task and module, drop the `gamma` largest entries and all but the next `density`, then take the weighted sum.

    Args:
        x: The module.
        density: Fraction of entries kept.
        gamma: Fraction of entries dropped at the top, as outliers.
        space: Where entries are compared; see `ties`.

    Raises:
        UsageError: density + gamma exceeds 1.

    Cost: two passes over row blocks for the bounds, one for the sum.
    Source: Davari & Belilovsky, ECCV 2024, section 3 (beta = 1 - density - gamma is cut at the bottom).
    **Deviates**: entries equal to the bound stay on either side, so that a tensor of equal entries is not emptied.
    """
    if density + gamma > 1 + 1e-12:
        raise UsageError(f"breadcrumbs: density {density:g} + gamma {gamma:g} exceeds 1")
    low = [float(bound) for bound in magnitude_thresholds([x], min(1.0, density + gamma), space)]
    high = [math.inf] * len(x.tasks)
    if gamma > 0:  # entries above the (n + 1)-th largest are dropped, n = floor(gamma N)
        high = [float(bound) for bound in magnitudes_at([x], lambda n: min(n, math.floor(gamma * n) + 1), space)]

    def middle(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part, bottom, top in zip(parts, low, high, strict=True):
            kept = keep_from(part, bottom)
            yield kept - torch.nn.functional.hardshrink(kept, top) if top < math.inf else kept

    return in_space(x, lambda parts, place: weighted_sum(middle(parts), x.weights), space, whole_rows=False)
