"""Each task's largest entries elected, its part made once: what bounds of parts, and an election below them, give in two passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.memory import again_like
from plait.merging.entries.brackets import kth_largest
from plait.merging.entries.compiled import Loops, loops_for
from plait.merging.entries.elementwise import in_blocks, largest_below
from plait.merging.entries.quantile import WHOLE, thresholds_of
from plait.merging.entries.tiles import TOGETHER, Products
from plait.merging.methods.ties import trimmed


def largest_elected(products: Products, density: float, weights: Sequence[float], alike: int) -> Float[Tensor, "n m"]:
    """Keep the `density` largest entries of every task's part, elect the sign of their weighted sum, average those that agree.

    Parts that fit in memory are held whole, as many as are looked at together: the entries that a bound was found among are then
    those that it cuts, and every one is computed once. The bits are those of `thresholds_of` and `in_blocks`, which take the others,
    where a product has the same bits alone and as a part of a larger one (on some processors the last bit differs).

    Args:
        products: Per task, the factors of its part.
        density: Fraction kept, in (0, 1].
        weights: One per task.
        alike: How many modules of about this size there are; see `in_blocks`.
    """
    (n, m), count, stacked = products.shape, len(products.lefts), products.stacked
    if stacked is not None and stacked[0].dtype == torch.float32 and min(count, TOGETHER) * n * m <= WHOLE:
        loops = loops_for(n * m * count * alike)
        if loops is not None:
            return _in_one_pass(*stacked, density, weights, loops)
    return in_blocks(products, trimmed(thresholds_of(products, density), weights), "core", alike=alike).dense()


def _in_one_pass(
    left: Float[Tensor, "T n r"], right: Float[Tensor, "T r m"], density: float, weights: Sequence[float], loops: Loops
) -> Float[Tensor, "n m"]:
    count, n, m = len(left), left.shape[1], right.shape[2]
    merged, weight = left.new_empty(n, m), np.array(weights, np.float32)
    sums = again_like("sums", left, (4, n, m)).numpy()
    for first in range(0, count, TOGETHER):
        stop = min(first + TOGETHER, count)
        whole, sizes = (again_like(name, left, (stop - first, n, m)) for name in ("parts", "sizes"))
        torch.bmm(left[first:stop], right[first:stop], out=whole)
        below = np.full(stop - first, -1.0, np.float32)
        if density < 1:
            bounds = kth_largest(torch.abs(whole, out=sizes).flatten(1), math.ceil(density * (n * m)))
            below[:] = [largest_below(bound, np.float32) for bound in bounds.tolist()]
        rule = below, weight[first:stop], sums, first == 0, stop == count, True, np.float32(1)
        loops.elect(whole.numpy(), None, *rule, merged.numpy())
        del whole, sizes
    return merged
