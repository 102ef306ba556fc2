"""Fisher merging: every entry weighed by how much the task's likelihood depends on it."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.errors import UsageError
from plait.merging.dense import DenseDelta, MergedDelta
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.options import Positive, Space


@merge_method("fisher", paper="arXiv:2111.09832", needs=("fisher",))
def fisher(x: MergeInputs, *, floor: Positive = 1e-6, space: Space = "dense") -> MergedDelta:
    """sum_t w_t F_t D_t / sum_t w_t F_t, entry by entry, F_t the diagonal Fisher information at W0 + D_t.

    Args:
        x: The module, with Fisher diagonals (out, in).
        floor: F is raised to this, so that entries no task depends on get the plain mean.
        space: Only "dense": the information is a diagonal over the entries of W. Turned into the basis of a core or of
            KnOTS it is none any more, and the rest of it was never collected.

    Raises:
        UsageError: Another space, or weights that do not weigh.

    Cost: one pass over row blocks of the deltas and of the diagonals.
    Source: Matena & Raffel, NeurIPS 2022, equation 4.
    **Deviates**: merged are the dense entries of the target modules; all else is W0 in every task. A task that does not
    adapt a module says nothing about it: the mean there is over those that do.
    """
    if space != "dense":
        raise UsageError(
            f"fisher has no space {space!r}: its diagonal belongs to the dense entries and does not turn with a basis",
            hint="leave space out; regmean weighs by second moments, which do turn",
        )
    importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and x.weights[t] != 0.0]
    if not present:
        return x.zero()

    def rows(start: int, stop: int) -> Tensor:
        total = x.A[0].new_zeros(stop - start, x.shape[1])
        mass = torch.zeros_like(total)
        for t in present:
            F = x.fisher[t].rows(start, stop).to(total.device, total.dtype).clamp(min=floor) * x.weights[t]
            mass += F
            total += F.mul_(x.block(t, start, stop))
        return torch.where(mass != 0, total / mass, 0.0)

    return DenseDelta(x.shape, rows)
