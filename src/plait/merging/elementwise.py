"""Rules that act entry by entry, in the space where entries are compared: dense rows, the lossless core, or KnOTS' S V^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.stream import DenseDelta, MergedDelta, row_blocks

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
        core = x.core.in_svd_basis()
        return core.factors(rule(core.parts(), space), x.kind)
    left, parts = x.core.knots()
    return LoraFactors(rule(iter([p.clone() for p in parts]), space), left, 1.0, x.kind)


def parts_of(x: MergeInputs, task: int, space: str) -> Iterator[Tensor]:
    """The entries of one task's delta in a space, in the order and blocks in which a rule meets them."""
    if x.ranks[task] == 0:
        return
    if space == "dense":
        for start, stop in row_blocks(x.shape):
            yield x.block(task, start, stop)
    elif space == "core":
        yield x.core.in_svd_basis().part(task)
    else:
        yield x.core.knots()[1][task].clone()


def entry_count(x: MergeInputs, task: int, space: str) -> int:
    """How many entries `parts_of` yields in all."""
    if x.ranks[task] == 0:
        return 0
    return x.shape[0] * x.shape[1] if space == "dense" else sum(p.numel() for p in parts_of(x, task, space))


def signed_mean(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect the sign of sum_t w_t p_t per entry; the mean, by |w_t|, of the nonzero w_t p_t / |w_t| that agree with it.

    Args:
        parts: One per task, consumed one by one and changed in place.
        weights: One per task, not all zero; a negative weight turns its task's signs.

    Returns:
        Zero where no entry is left.
    """
    sums: list[Tensor] = []
    for part, weight in zip(parts, weights, strict=True):
        if not sums:
            sums = [torch.zeros_like(part) for _ in range(4)]
        up, down, up_weight, down_weight = sums
        if weight != 1.0:
            part *= weight
        up_weight.add_(part > 0, alpha=abs(weight))
        down_weight.add_(part < 0, alpha=abs(weight))
        down += part.clamp(max=0.0)
        up += part.clamp_(min=0.0)
    up, down, up_weight, down_weight = sums
    positive = up + down >= 0
    total, weight_sum = torch.where(positive, up, down), torch.where(positive, up_weight, down_weight)
    return total.div_(weight_sum.clamp_(min=torch.finfo(total.dtype).tiny))


def weighted_sum(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_t w_t p_t, one part at a time."""
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        total = part.mul_(weight) if total is None else total.add_(part, alpha=weight)
    if total is None:
        raise ValueError("no parts")
    return total
