"""EMR: elect one unified delta; per task a mask and a rescaler turn it back into that task's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Space


@merge_method("emr", paper="arXiv:2405.17461")
def emr(x: MergeInputs, *, space: Space = "dense") -> MergedDelta:
    """The unified delta: the sign of the sum, and the largest magnitude among the tasks that have it.

    On its own it serves no task: at inference task t uses l_t M_t * unified, M_t = 1 where D_t has the unified sign and
    l_t = sum |D_t| / sum |M_t * unified|. `per_task.write_per_task` writes masks and rescalers beside it.

    Args:
        x: The module.
        space: Where signs are elected; see `ties`. Masks are for dense entries, so `--per-task` knows no other.

    Cost: one pass over row blocks.
    Source: Huang et al., NeurIPS 2024, section 3.2.
    **Deviates**: weights multiply the deltas first. A sum of exactly zero counts as negative, as in the authors' code.
    """
    return in_space(x, lambda parts, place: elected(parts, x.weights), space, whole_rows=False)


def elected(parts: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """sign(sum_t w_t p_t) times the largest |w_t p_t| among those of that sign, 0 where there is none."""
    total = highest = lowest = None
    for part, weight in zip(parts, weights, strict=True):
        if weight != 1.0:
            part = part.mul_(weight)
        if total is None or highest is None or lowest is None:
            total, highest, lowest = part, part.clamp(min=0.0), part.clamp(max=0.0)
            continue
        total += part
        torch.maximum(highest, part, out=highest)
        torch.minimum(lowest, part, out=lowest)
    if total is None or highest is None or lowest is None:
        raise ValueError("no parts")
    return torch.where(total > 0, highest, lowest)
