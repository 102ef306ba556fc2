"""Pico: directions of B that many tasks share are shrunk before a merge, and the norm is restored after it."""

from __future__ import annotations

import torch

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs


def shrink_shared_directions(x: MergeInputs) -> MergeInputs:
    """Shrink direction i of the stacked B by 1 / (1 + (T - 1) c_i), c_i = s_i^2 / sum s^2; keep every task's norm.

    Each A_t is first made orthonormal (its triangular factor goes into B_t), else the result would depend on how a delta
    is split between A and B.

    Cost: a thin QR per task, one SVD of the stacked B's core.
    **Deviates**: the authors take B as it is, so that their result depends on the split; and they restore either each task's norm
    (their tool for folders) or the merge's (their API): here both.
    """
    turned = [torch.linalg.qr(a.double().T) for a in x.A]
    A, B = [q.T for q, _ in turned], [b.double() @ r.T for b, (_, r) in zip(x.B, turned, strict=True)]
    stacked = torch.cat(B, dim=1)
    values, vectors = torch.linalg.eigh(stacked.T @ stacked)
    values = values.clamp(min=0.0)
    total = values.sum()
    if not total > 0:
        return x
    present = sum(1 for rank in x.ranks if rank)
    # Left directions u_i = stacked v_i / s_i: shrinking along u_i scales the coordinates along v_i.
    shrunk = stacked @ (vectors * (1 / (1 + (present - 1) * values / total))) @ vectors.T
    parts = torch.split(shrunk, [b.shape[1] for b in B], dim=1)
    kept = [_with_norm_of(part, b) for part, b in zip(parts, B, strict=True)]
    return x.with_factors(tuple(a.float() for a in A), tuple(b.float() for b in kept))


def _with_norm_of(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    norm = part.norm()
    return part * (wanted.norm() / norm) if norm > 0 else part


def mean_norm_factor(x: MergeInputs, norm: float) -> float:
    """What brings a merged delta of this norm to the mean Frobenius norm of the inputs that adapt the module."""
    norms = [LoraFactors(a, b).norm_squared() ** 0.5 for a, b in zip(x.A, x.B, strict=True) if a.shape[0]]
    return sum(norms) / len(norms) / norm if norms and norm > 0 else 1.0
