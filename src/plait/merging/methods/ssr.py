"""SSR: a router between all A's and all B's that sends each task's inputs through the task's own factors, in closed form."""

from __future__ import annotations

import torch

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.options import Positive


@merge_method("ssr", paper="arXiv:2606.10617", needs=("moments",))
def ssr(x: MergeInputs, *, ridge: Positive = 1e-4, normalised: bool = True) -> LoraFactors:
    """D = [B_1 .. B_T] R [A_1; ..; A_T] with the R x R router that best sends task t's z to (0 .. A_t h .. 0), z = [A_1; ..; A_T] h.

    R minimises sum_t w_t E_t |R z - P_t z|^2, P_t the rows of task t: R = Q G^-1 with G = A (sum_t w_t M_t) A^T, A all rows, and
    the rows of t in Q those of w_t A M_t A^T. Between `least_squares` (one number a task) and `regmean` (a free D).

    Args:
        x: The module, with moments.
        ridge: Share of each row's own energy that is added to it in G.
        normalised: Divide each task's moments by their trace, so that a task with more tokens weighs no more.

    Returns:
        Exact factors of rank R: the A's as they are.

    Cost: R d^2 per task, one Cholesky factorisation of (R, R).
    Source: SSR-Merge, ICML 2026, section 3 (R = Q G^-1).
    **Deviates**: moments from a file, usually those of the base (the authors run each adapter), by default trace-normalised; the
    ridge is a share of each row's energy and stands in Q too, so that it does not depend on how long the rows of A are and one
    adapter comes back (the authors add 1e-4 to G alone).
    """
    weights = importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and weights[t] != 0.0]
    if not present:
        return x.zero()
    A = torch.cat([x.A[t] for t in present]).double()
    ranks = [x.ranks[t] for t in present]
    G, Q = A.new_zeros(len(A), len(A)), A.new_zeros(len(A), len(A))
    start = 0
    for t, rank in zip(present, ranks, strict=True):
        moments, rows = x.moments[t], slice(start, start + rank)
        weight = weights[t] / (moments.trace or float(moments.normalised().trace()) if normalised else 1.0)
        seen = moments.project(A) * weight
        G += seen
        Q[rows] += seen[rows]
        start += rank
    extra = torch.diag(G.diagonal() * ridge)
    R = torch.linalg.solve(G + extra, Q + extra, left=False)
    B = torch.cat([x.B[t] for t in present], dim=1).double() @ R
    return LoraFactors(A.to(x.A[0].dtype), B.to(x.B[0].dtype), 1.0, x.kind)
