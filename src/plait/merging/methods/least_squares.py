"""Least squares: one weight per task and module, such that each task's own inputs see their own delta best."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.merging.spectra.core import block_sums

# Eigenvalues of H below this share of the largest belong to deltas that are combinations of the others.
_SINGULAR = 1e-10


@merge_method("least_squares", needs=("moments",))
def least_squares(x: MergeInputs) -> LoraFactors:
    """Weights l that minimise sum_t w_t tr[(sum_u l_u D_u - D_t) m_t (...)^T], m_t the trace-normalised moments.

    H l = b with H_uv = sum_t w_t tr(D_u m_t D_v^T) and b_u = sum_t w_t tr(D_u m_t D_t^T): T x T, from statistics alone,
    no labels and no search. A singular H (two equal deltas) takes the solution of least norm.

    Cost: R^2 d + R d^2 per task for A m_t A^T.
    Source: ours; kin to RegMean, whose D is free where this one is a weighted sum, and to LOT (arXiv:2505.23859).
    """
    importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and x.weights[t] != 0.0]
    if not present:
        return x.zero()
    H, b = normal_equations(x, present)
    values, vectors = torch.linalg.eigh(H)
    kept = values.abs() > values.abs().max() * _SINGULAR
    if not bool(kept.any()):
        return x.zero()
    found = vectors[:, kept] @ ((vectors[:, kept].T @ b) / values[kept])
    weights = [0.0] * len(x.tasks)
    for t, weight in zip(present, found.tolist(), strict=True):
        weights[t] = weight
    return x.combination(weights)


def normal_equations(x: MergeInputs, present: list[int]) -> tuple[Float[Tensor, "T T"], Float[Tensor, " T"]]:
    """H and b over the tasks that adapt the module, in float64."""
    A = torch.cat([x.A[t] for t in present]).double()
    B = torch.cat([x.B[t] for t in present], dim=1).double()
    ranks = [x.ranks[t] for t in present]
    inner = B.T @ B
    H, b = A.new_zeros(len(present), len(present)), A.new_zeros(len(present))
    for i, t in enumerate(present):
        seen = A @ x.moments[t].normalised().to(A.device, torch.float64) @ A.T
        products = block_sums(inner * seen * x.weights[t], ranks)
        H += products
        b += products[:, i]
    return H, b
