"""Rules that act entry by entry, in the space where entries are compared: dense rows, the lossless core, or KnOTS' S V^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.adapters.memory import empty_like
from plait.merging.dense import AT_ONCE, DenseDelta, MergedDelta
from plait.merging.inputs import MergeInputs
from plait.merging.random_masks import Place
from plait.merging.tiles import Products, Spare

# (one part per task, their place for random draws) -> the merged part. A rule may change the parts in place.
Rule = Callable[[Iterable[Tensor], Place], Tensor]


def in_space(x: MergeInputs, rule: Rule, space: str = "dense", *, whole_rows: bool = True) -> MergedDelta:
    """Apply a rule to all entries of one module.

    Args:
        x: The module.
        rule: The elementwise rule.
        space: "dense" (the result is dense), "core" (the deltas in the SVD basis of the lossless core) or "knots" (the
            parts S V_t^T of the SVD of all deltas side by side); the last two give exact LoRA factors.
        whole_rows: Whether the rule is given whole rows; one that looks at entries alone is faster without.
    """
    if x.total_rank == 0:
        return x.zero()
    merged = in_blocks(Products.of(*pairs_of(x, space)), rule, space, whole_rows=whole_rows)
    if space == "dense":
        return merged
    if space == "core":
        return x.svd_core.factors(merged.dense(), x.kind)
    return LoraFactors(merged.dense(), x.aligned.left, 1.0, x.kind)


def in_blocks(products: Products, rule: Rule, space: str, *, whole_rows: bool = False) -> DenseDelta:
    """Apply a rule to products of factors, tile after tile: as many entries as are computed together on the device."""
    shape, drawn = products.shape, Place(space, products.shape)

    def rows(start: int, stop: int) -> Tensor:
        merged = empty_like(products.lefts[0], (stop - start, shape[1]))
        spare = Spare()
        for tile in products.tiles(whole_rows=whole_rows, start=start, stop=stop):
            place = replace(drawn, start=tile.top, left=tile.left, spare=spare)
            merged[tile.top - start : tile.bottom - start, tile.left : tile.right] = rule(
                products.parts(tile, spare), place
            )
        return merged

    return DenseDelta(shape, rows, AT_ONCE)


def pairs_of(x: MergeInputs, space: str = "dense") -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Per task, the two factors whose product is its part in a space: (n, r_t) and (r_t, m)."""
    if space == "dense":
        return x.B, x.A
    if space == "core":
        return x.svd_core.B, x.svd_core.A
    return x.aligned.parts, x.A


def parts_of(x: MergeInputs, spare: Spare, space: str = "dense") -> Iterator[tuple[int, Tensor]]:
    """(task, block) of all entries in a space, free to be changed, valid until the next; a task without the module has none."""
    if not x.total_rank:
        return
    products = Products.of(*pairs_of(x, space))
    for tile in products.tiles(whole_rows=False):
        yield from ((t, part) for t, part in enumerate(products.parts(tile, spare)) if x.ranks[t])


def keep_from(part: Tensor, bound: float | Tensor) -> Tensor:
    """Zero the entries smaller than `bound` in magnitude, in place; of a stack of parts, each has a bound of its own.

    hardshrink keeps what exceeds a value, so it is given the next one below; it is ten times faster than a mask.
    """
    if isinstance(bound, Tensor):
        for one, b in zip(part, bound.tolist(), strict=True):
            keep_from(one, b)
        return part
    if bound <= 0:
        return part
    kind = np.float64 if part.dtype == torch.float64 else np.float32
    below = float(np.nextafter(kind(bound), kind(0)))
    return torch.hardshrink(part, below, out=part)


def signed_mean(
    parts: Iterable[Tensor], weights: Sequence[float], agreeing: str = "mean", spare: Spare | None = None
) -> Tensor:
    """Elect the sign of sum_t w_t p_t per entry; the mean, by |w_t|, of the nonzero w_t p_t / |w_t| that agree with it.

    Args:
        parts: One per task, consumed one by one and changed in place.
        weights: One per task; a negative weight turns its task's signs.
        agreeing: "mean", or "sum" of the w_t p_t that agree.
        spare: Where the result and what it takes lie; new memory by default.

    Returns:
        Zero where no entry is left.
    """
    spare = spare or Spare()
    sums: list[Tensor] = []
    for part, weight in zip(parts, weights, strict=True):
        if not sums:
            sums = [spare.like(name, part).zero_() for name in ("total", "mass", "votes", "turnout", "sign")]
        total, mass, votes, turnout, sign = sums
        torch.sign(part, out=sign)
        if weight != 1.0:
            part = part.mul_(weight)
            votes.add_(sign, alpha=weight)
            turnout.addcmul_(sign, sign, value=abs(weight))
            total += part
            mass.add_(part.abs_())
            continue
        # Products with a sign are exact, and one kernel takes a product and a sum: the absolute values need none of their own.
        total += part
        votes += sign
        mass.addcmul_(part, sign)
        turnout.addcmul_(sign, sign)
    total, mass, votes, turnout, sign = sums
    # With s the elected sign, (total + s mass) / 2 is the sum of the entries of that sign: mass and s total have no
    # cancellation to fear, since s total >= 0. No masks: torch's are several times slower than arithmetic.
    elected = torch.copysign(total.new_ones(()), total, out=sign)
    chosen = total.add_(mass.mul_(elected)).mul_(0.5)
    if agreeing == "sum":
        return chosen
    agreed = turnout.add_(votes.mul_(elected)).mul_(0.5)
    return chosen.div_(agreed.clamp_(min=torch.finfo(chosen.dtype).tiny))


def weighted_sum(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_t w_t p_t, one part at a time, changed in place."""
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if total is None:
            total = part if weight == 1.0 else part.mul_(weight)
        else:
            total.add_(part, alpha=weight)
    if total is None:
        raise ValueError("no parts")
    return total
