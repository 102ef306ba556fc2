"""Task arithmetic with everything that mergekit adds to it: entries dropped, rescaled, elected by sign, averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from plait.errors import UsageError
from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space, keep_from
from plait.merging.entries.quantile import magnitudes_at
from plait.merging.entries.random_masks import Drops, Place
from plait.merging.entries.tiles import Products, Spare
from plait.merging.inputs import MergeInputs
from plait.merging.methods.della import mag_prune
from plait.merging.registry import merge_method
from plait.options import Density, Fraction

# (task, entries, place) -> what is left of the entries, which may be changed in place.
Kept = Callable[[int, Tensor, Place], Tensor]
_SMALL_NORM, _SMALL_SUM = 1e-7, 1e-8  # below these nothing is rescaled, and nothing divided


@merge_method("sparse_arithmetic", paper="arXiv:2403.13257")
def sparse_arithmetic(
    x: MergeInputs,
    *,
    drop: Literal["none", "small", "outliers", "random", "ranked"] = "none",
    density: Density = 1.0,
    gamma: Fraction = 0.01,
    epsilon: Fraction = 0.15,
    rescale: bool = False,
    elect: bool = False,
    normalise: bool = False,
) -> MergedDelta:
    """Drop entries of each delta, rescale the others to its L1 norm, multiply by the weights, elect signs, add up, divide.

    What mergekit calls task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, della and della_linear
    is this with `drop`, `rescale`, `elect` and `normalise` set; a density of 1 drops nothing.

    Args:
        x: The module.
        drop: Which entries go, per task and module of n entries: all but the floor(density n) largest ("small", one at
            least); the floor(gamma n) largest too ("outliers", fewer where density leaves no room); any, with probability
            1 - density ("random"); or with a probability that falls with the magnitude's rank in its row, from
            1 - density + epsilon to 1 - density - epsilon ("ranked").
        density: Fraction kept, or the mean probability to be kept.
        gamma: Fraction of outliers.
        epsilon: Half the width of the window of probabilities.
        rescale: Multiply what is left by |D|_1 / |left|_1.
        elect: Keep the entries whose sign is that of their sum over the tasks, zero counting as positive.
        normalise: Divide by the sum of the weights: of the entries that agree where signs are elected, else of all.

    Raises:
        UsageError: A window of probabilities that leaves (0, 1).

    Cost: two passes over row blocks for bounds, one for norms, one for the result.
    Source: Goddard et al. (mergekit), 2024, and the methods it names; rounding, norms and divisors as mergekit 0.1.5.
    **Deviates**: random masks follow the adapter's content, as in `dare_linear`, where mergekit draws from one stream.
    """
    if density >= 1 or drop == "none":
        if not elect:
            return x.combination(_divided(x.weights) if normalise else list(x.weights))
        kept: Kept = _unchanged
    else:
        kept = _kept(x, drop, density, gamma, epsilon)
        kept = _rescaled(x, kept, whole_rows=drop == "ranked") if rescale else kept

    def rule(parts: Iterable[Tensor], place: Place) -> Tensor:
        left = [kept(t, part, place) if x.ranks[t] else part for t, part in enumerate(parts)]
        weights = _divided(x.weights) if normalise and not elect else x.weights
        scaled = [part.mul_(w) for part, w in zip(left, weights, strict=True)]
        return _elected(scaled, weights, normalise) if elect else torch.stack(scaled).sum(0)

    return in_space(x, rule, whole_rows=drop == "ranked")  # ranks are those of a row


def _unchanged(task: int, part: Tensor, place: Place) -> Tensor:
    return part


def _divided(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights] if abs(total) >= _SMALL_SUM else list(weights)


def _elected(scaled: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    total = torch.stack(list(scaled)).sum(0)
    elected = (total >= 0).to(total.dtype) * 2 - 1
    chosen, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight in zip(scaled, weights, strict=True):
        agrees = (part.sign() == elected).to(part.dtype)
        chosen.addcmul_(part, agrees)
        divisor.add_(agrees, alpha=weight)
    return chosen.div_(torch.where(divisor == 0, 1.0, divisor)) if normalise else chosen


def _kept(x: MergeInputs, drop: str, density: float, gamma: float, epsilon: float) -> Kept:
    if drop == "small":
        low = _bounds(x, lambda n: max(1, math.floor(density * n)))
        return lambda task, part, place: keep_from(part, low[task])
    if drop == "outliers":
        return _between(x, density, gamma)
    if drop == "random":
        return Drops(x, density).drop
    if not epsilon < min(density, 1 - density):
        raise UsageError(
            f"entries would be kept with probability {density - epsilon:g} to {density + epsilon:g}, outside (0, 1)",
            hint="a smaller epsilon, or a density nearer the middle",
        )
    return lambda task, part, place: mag_prune(x, task, part, place, density, 2 * epsilon, divided=False)


def _bounds(x: MergeInputs, rank: Callable[[int], int]) -> list[float]:
    return [float(bound) for bound in magnitudes_at([x], rank)]


def _between(x: MergeInputs, density: float, gamma: float) -> Kept:
    """The floor(density n) entries below the outliers; of those there are fewer where density leaves no room for them."""
    n = x.shape[0] * x.shape[1]
    left = math.floor(density * n)
    above = min(math.floor(gamma * n), n - left)
    if left == 0:
        return lambda task, part, place: part.zero_()
    low = _bounds(x, lambda n: above + left)
    high = _bounds(x, lambda n: above + 1) if above else [math.inf] * len(x.tasks)

    def kept(task: int, part: Tensor, place: Place) -> Tensor:
        part = keep_from(part, low[task])
        return part - torch.nn.functional.hardshrink(part, high[task]) if above else part

    return kept


def _rescaled(x: MergeInputs, kept: Kept, *, whole_rows: bool) -> Kept:
    """What is left of a task's delta, times the ratio of the L1 norms before and after."""
    sums = [[0.0, 0.0] for _ in x.ranks]
    products, spare, drawn = Products.of(x.B, x.A), Spare(), Place("dense", x.shape)
    for tile in products.tiles(
        whole_rows=whole_rows
    ):  # those that the result is made of: a bound is met by the same bits
        place = replace(drawn, start=tile.top, left=tile.left, spare=spare)
        for task, part in enumerate(products.parts(tile, spare)):
            if x.ranks[task]:
                sums[task][0] += float(part.abs().sum(dtype=torch.float64))
                sums[task][1] += float(kept(task, part, place).abs().sum(dtype=torch.float64))
    factors = [before / after if min(before, after) >= _SMALL_NORM else 1.0 for before, after in sums]
    return lambda task, part, place: kept(task, part, place).mul_(factors[task])
