"""SCE: select the entries in which tasks differ most, weigh tasks by their energy there, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from plait.merging.elementwise import in_space, signed_mean
from plait.merging.inputs import MergeInputs
from plait.merging.quantile import nth_largest
from plait.merging.registry import merge_method
from plait.merging.stream import MergedDelta, row_blocks
from plait.options import Density, Space


@merge_method("sce", paper="arXiv:2408.07990")
def sce(x: MergeInputs, *, density: Density = 0.1, space: Space = "dense") -> MergedDelta:
    """Select, calculate, erase: keep the entries of largest variance over the tasks, weigh and elect.

    Of the entries, the `density` with the largest variance over the tasks are selected; task t weighs
    n_t = sum of its selected squares / that of all; the sign of the weighted sum is elected, and the entries that agree
    are averaged by n_t.

    Args:
        x: The module.
        density: Fraction of entries selected.
        space: Where entries are compared; see `ties`.

    Cost: three passes over row blocks.
    Source: Wan et al. (FuseChat), 2024, section 3.3.
    **Deviates**: signs are elected by the weighted sum and the weights renormalised over the tasks that agree, entry by
    entry. Given weights multiply the deltas. With one task every variance is zero: it comes back unchanged.
    """
    present = [t for t, rank in enumerate(x.ranks) if rank]
    if len(present) < 2:
        return x.combination(x.weights)

    def variances() -> Iterator[tuple[int, Tensor]]:
        for parts in _weighted_parts(x, space):
            yield 0, _variance(parts)

    bound = float(nth_largest(variances, lambda total: math.ceil(density * total), 1)[0])
    energy = torch.zeros(len(x.tasks), dtype=torch.float64)
    for parts in _weighted_parts(x, space):
        kept = _selected(parts, bound)
        energy += torch.tensor([float(part.double().square().sum()) for part in kept], dtype=torch.float64)
    if not float(energy.sum()) > 0:
        return x.zero()
    shares: Sequence[float] = (energy / energy.sum()).tolist()

    def rule(parts: Iterable[Tensor], place: str) -> Tensor:
        scaled = [part.mul_(w) if w != 1.0 else part for part, w in zip(parts, x.weights, strict=True)]
        return signed_mean(iter(_selected(scaled, bound)), shares)

    return in_space(x, rule, space)


def _weighted_parts(x: MergeInputs, space: str) -> Iterator[list[Tensor]]:
    """Every task's entries times its weight, place by place as `in_space` goes through them."""
    if space == "dense":
        for start, stop in row_blocks(x.shape):
            yield [x.block(t, start, stop).mul_(w) for t, w in enumerate(x.weights)]
    else:
        parts = x.svd_core.parts() if space == "core" else x.core.knots()[1]
        yield [part.mul_(w) for part, w in zip(parts, x.weights, strict=True)]


def _variance(parts: Sequence[Tensor]) -> Tensor:
    mean = sum(parts[1:], start=parts[0]) / len(parts)
    return sum(((part - mean).square() for part in parts[1:]), start=(parts[0] - mean).square()) / len(parts)


def _selected(parts: Sequence[Tensor], bound: float) -> list[Tensor]:
    chosen = (_variance(parts) >= bound).to(parts[0].dtype)
    return [part * chosen for part in parts]
