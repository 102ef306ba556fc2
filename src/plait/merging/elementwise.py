"""Rules that act entry by entry, in the space where entries are compared: dense rows, the lossless core, or KnOTS' S V^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.dense import DenseDelta, MergedDelta, entries_together, row_blocks
from plait.merging.inputs import MergeInputs
from plait.merging.random_masks import Place

# (one part per task, their place for random draws) -> the merged part. A rule may change the parts in place.
Rule = Callable[[Iterable[Tensor], Place], Tensor]


def in_space(x: MergeInputs, rule: Rule, space: str = "dense") -> MergedDelta:
    """Apply a rule to all entries of one module.

    Args:
        x: The module.
        rule: The elementwise rule.
        space: "dense" (the result is dense), "core" (the deltas in the SVD basis of the lossless core) or "knots" (the
            parts S V_t^T of the SVD of all deltas side by side); the last two give exact LoRA factors.
    """
    if x.total_rank == 0:
        return x.zero()
    lefts, rights = pairs_of(x, space)
    merged = in_blocks(lefts, rights, rule, space, x.device)
    if space == "dense":
        return merged
    if space == "core":
        return x.svd_core.factors(merged.dense(), x.kind)
    return LoraFactors(merged.dense(), x.aligned.left, 1.0, x.kind)


def in_blocks(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], rule: Rule, space: str, device: torch.device
) -> DenseDelta:
    """Apply a rule to the products left_t right_t, rows after rows: as many as are computed together on the device."""
    shape = lefts[0].shape[0], rights[0].shape[1]
    drawn = Place(space, shape)

    def rows(start: int, stop: int) -> Tensor:
        parts = (left[start:stop] @ right for left, right in zip(lefts, rights, strict=True))
        return rule(parts, replace(drawn, start=start))

    return DenseDelta(shape, rows, entries_together(device))


def pairs_of(x: MergeInputs, space: str = "dense") -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Per task, the two factors whose product is its part in a space: (n, r_t) and (r_t, m)."""
    if space == "dense":
        return x.B, x.A
    if space == "core":
        return x.svd_core.B, x.svd_core.A
    return x.aligned.parts, x.A


def parts_of(x: MergeInputs, space: str = "dense") -> Iterator[tuple[int, Tensor]]:
    """(task, block) of all entries in a space, free to be changed; a task that does not adapt the module has none."""
    present = [t for t, rank in enumerate(x.ranks) if rank]
    if not present:
        return
    lefts, rights = pairs_of(x, space)
    for start, stop in row_blocks((lefts[0].shape[0], rights[0].shape[1]), entries_together(x.device)):
        yield from ((t, lefts[t][start:stop] @ rights[t]) for t in present)


def keep_from(part: Tensor, bound: float | Tensor) -> Tensor:
    """Zero the entries smaller than `bound` in magnitude; of a stack of parts, each has a bound of its own.

    hardshrink keeps what exceeds a value, so it is given the next one below; it is ten times faster than a mask.
    """
    if isinstance(bound, Tensor):
        return torch.stack([keep_from(one, b) for one, b in zip(part, bound.tolist(), strict=True)])
    if bound <= 0:
        return part
    kind = np.float64 if part.dtype == torch.float64 else np.float32
    return torch.nn.functional.hardshrink(part, float(np.nextafter(kind(bound), kind(0))))


def signed_mean(parts: Iterable[Tensor], weights: Sequence[float], agreeing: str = "mean") -> Tensor:
    """Elect the sign of sum_t w_t p_t per entry; the mean, by |w_t|, of the nonzero w_t p_t / |w_t| that agree with it.

    Args:
        parts: One per task, consumed one by one and changed in place.
        weights: One per task; a negative weight turns its task's signs.
        agreeing: "mean", or "sum" of the w_t p_t that agree.

    Returns:
        Zero where no entry is left.
    """
    sums: list[Tensor] = []
    for part, weight in zip(parts, weights, strict=True):
        sign = part.sign()
        if not sums:
            sums = [torch.zeros_like(part) for _ in range(4)]
        total, mass, votes, turnout = sums
        if weight != 1.0:
            part = part.mul_(weight)
            votes.add_(sign, alpha=weight)
            turnout.addcmul_(sign, sign, value=abs(weight))
            mass.add_(part.abs())
            total += part
            continue
        # Products with a sign are exact, and one kernel takes a product and a sum: the absolute values need none of their own.
        total += part
        votes += sign
        mass.addcmul_(part, sign)
        turnout.addcmul_(sign, sign)
    total, mass, votes, turnout = sums
    # With s the elected sign, (total + s mass) / 2 is the sum of the entries of that sign: mass and s total have no
    # cancellation to fear, since s total >= 0. No masks: torch's are several times slower than arithmetic.
    elected = torch.copysign(torch.ones_like(total), total)
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
