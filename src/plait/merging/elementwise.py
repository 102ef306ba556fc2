"""Rules that act entry by entry, in the space where entries are compared: dense rows, the lossless core, or KnOTS' S V^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.dense import DenseDelta, MergedDelta, row_blocks
from plait.merging.inputs import MergeInputs

# (one part per task, a name of the place for random draws) -> the merged part. A rule may change the parts in place.
Rule = Callable[[Iterable[Tensor], str], Tensor]


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
    if space == "dense":
        return DenseDelta(x.shape, lambda i, j: rule((x.block(t, i, j) for t in range(len(x.tasks))), str(i)))
    if space == "core":
        core = x.svd_core
        return core.factors(rule(core.parts(), space), x.kind)
    left, parts = x.core.knots()
    return LoraFactors(rule(iter(parts), space), left, 1.0, x.kind)


def parts_of(x: MergeInputs, space: str = "dense") -> Iterator[tuple[int, Tensor]]:
    """(task, block) of all entries in a space, free to be changed; a task that does not adapt the module has none."""
    present = [t for t, rank in enumerate(x.ranks) if rank]
    if space == "dense":
        for start, stop in row_blocks(x.shape):
            yield from ((t, x.block(t, start, stop)) for t in present)
    elif present:
        parts = list(x.svd_core.parts()) if space == "core" else x.core.knots()[1]
        yield from ((t, parts[t]) for t in present)


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
        if weight != 1.0:
            part, sign = part.mul_(weight), sign.mul_(weight)
        if not sums:
            sums = [torch.zeros_like(part) for _ in range(4)]
        total, mass, votes, turnout = sums
        total += part
        mass += part.abs_()
        votes += sign
        turnout += sign.abs_()
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
