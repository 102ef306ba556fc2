"""SCE: select the entries in which tasks differ most, weigh tasks by their energy there, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space, pairs_of, signed_mean
from plait.merging.entries.quantile import nth_largest
from plait.merging.entries.random_masks import Place
from plait.merging.entries.tiles import Products, Spare
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Density, Space

_SMALL = 1e-6  # sum of the tasks' mean squares, below which mergekit weighs all alike


@merge_method("sce", paper="arXiv:2408.07990")
def sce(
    x: MergeInputs, *, density: Density = 0.1, space: Space = "dense", details: Literal["paper", "mergekit"] = "paper"
) -> MergedDelta:
    """Select, calculate, erase: keep the entries of largest variance over the tasks, weigh and elect.

    Of the entries, the `density` with the largest variance over the tasks are selected; task t weighs
    n_t = sum of its selected squares / that of all; the sign of the weighted sum is elected, and the entries that agree
    are averaged by n_t.

    Args:
        x: The module.
        density: Fraction of entries selected.
        space: Where entries are compared; see `ties`.
        details: "mergekit" elects by the unweighted sum, rounds the number of selected entries down (of those that differ
            at all, so that of one task none is), and gives all tasks one share where their mean squares add up to less
            than 1e-6, as they do for most small adapters.

    Cost: three passes over row blocks.
    Source: Wan et al. (FuseChat), 2024, section 3.3.
    **Deviates**: signs are elected by the weighted sum and the weights renormalised over the tasks that agree, entry by
    entry. Given weights multiply the deltas. With one task every variance is zero: it comes back unchanged.
    """
    as_mergekit = details == "mergekit"
    present = [t for t, rank in enumerate(x.ranks) if rank and x.weights[t]]
    if not any(x.weights):
        return x.zero()
    if len(present) < 2 and not as_mergekit:
        return x.combination(x.weights)

    def variances() -> Iterator[tuple[int, Tensor]]:
        for parts in _weighted_parts(x, space):
            yield 0, _variance(parts)

    if as_mergekit:
        chosen = math.floor(density * sum(int(torch.count_nonzero(v)) for _, v in variances()))
        if chosen == 0 and density < 1:
            return x.zero()
        bound = float(nth_largest(variances, lambda total: chosen, 1)[0]) if density < 1 else 0.0
    else:
        bound = float(nth_largest(variances, lambda total: math.ceil(density * total), 1)[0])
    energy = torch.zeros(sum(w != 0.0 for w in x.weights), dtype=torch.float64)
    for parts in _weighted_parts(x, space):
        kept = _selected(parts, bound)
        energy += torch.tensor([float(part.double().square().sum()) for part in kept], dtype=torch.float64)
    if not float(energy.sum()) > 0:
        return x.zero()
    if as_mergekit and float(energy.sum()) / (x.shape[0] * x.shape[1]) < _SMALL:
        energy = torch.ones_like(energy)
    shares: Sequence[float] = (energy / energy.sum()).tolist()

    def rule(parts: Iterable[Tensor], place: Place) -> Tensor:
        scaled = _weighted(parts, x.weights)
        chosen = _selected(scaled, bound)
        return _mean_of_agreeing(chosen, shares) if as_mergekit else signed_mean(iter(chosen), shares)

    return in_space(x, rule, space, whole_rows=False)


def _mean_of_agreeing(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean, by shares, of the entries whose sign is that of their plain sum, zero counting as positive."""
    total = sum(parts[1:], start=parts[0].clone())
    elected = (total >= 0).to(total.dtype) * 2 - 1
    mixed, mass = torch.zeros_like(total), torch.zeros_like(total)
    for part, share in zip(parts, shares, strict=True):
        agrees = (part.sign() == elected).to(part.dtype)
        mixed.addcmul_(part, agrees, value=share)
        mass.add_(agrees, alpha=share)
    return mixed.div_(mass.clamp_(min=1e-6))


def _weighted_parts(x: MergeInputs, space: str) -> Iterator[list[Tensor]]:
    """Every task's entries times its weight, place by place as `in_space` goes through them."""
    products, spare = Products.of(*pairs_of(x, space)), Spare()
    for tile in products.tiles(whole_rows=False):
        yield _weighted(products.parts(tile, spare), x.weights)


def _weighted(parts: Iterable[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Entries times weights; a task of weight 0 has no part in means and variances."""
    return [part.mul_(w) if w != 1.0 else part for part, w in zip(parts, weights, strict=True) if w]


def _variance(parts: Sequence[Tensor]) -> Tensor:
    mean = sum(parts[1:], start=parts[0]) / len(parts)
    return sum(((part - mean).square() for part in parts[1:]), start=(parts[0] - mean).square()) / len(parts)


def _selected(parts: Sequence[Tensor], bound: float) -> list[Tensor]:
    chosen = (_variance(parts) >= bound).to(parts[0].dtype)
    return [part * chosen for part in parts]
