"""SVC: singular values of a merge that several tasks add to are brought back to what one task has there."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.spectra.core import NOISE
from plait.merging.spectra.small_svd import thin_svd

# Least share of a task's own answer in a direction that counts: the authors' default.
ALPHA = 0.1
# Relative distance of singular values below which they are one value.
EQUAL = 1e-4


def calibrated(x: MergeInputs, merged: LoraFactors) -> LoraFactors:
    """Divide every singular value of a merge by how many times over it holds each task's answer there, on average.

    With M = U Z V^T, the merge and task t answer direction u_r with a_m = u_r^T M and a_t = u_r^T w_t D_t, and

        z_r <- z_r / mean_t max(<a_m, a_t> / |a_t|^2, alpha)

    so that one adapter stays as it is, and copies of one become that one. Singular vectors stay. Only factors are multiplied: with
    thin QRs of B and A^T the SVD is of (R, R), and a_t = (u_r^T B_t) A_t.

    Args:
        x: The module.
        merged: The method's result, cut to rank where a rank was asked for.

    Cost: two thin QRs, an SVD of (R, R), and R^2 (out + in) multiplications.
    Source: arXiv:2602.05536 (ICML 2026), and the authors' code of February 2026 (its later rule; alpha is its default, 0.1).
    **Deviates**: tasks count with their weights (the merge's own D_t are w_t D_t), and those that do not adapt the module or have
    weight 0 are not among the mean; an answer below 1e-6 of the task's norm is rounding and counts as none. A cut to rank comes
    first, so that what is kept is chosen by the values as they were. Directions of equal singular values (to 1e-4, as Iso-C makes
    them) have no basis of their own and are taken together: one answer, and one divisor.
    """
    tasks = [t for t, (w, rank) in enumerate(zip(x.weights, x.ranks, strict=True)) if w != 0.0 and rank]
    if not tasks:
        return merged
    f = merged.folded(torch.float32, merged.A.device)
    Qb, Rb = torch.linalg.qr(f.B.double())
    Qa, Ra = torch.linalg.qr(f.A.double().T)
    U, Z, Vt = thin_svd(Rb @ Ra.T)
    left, right, group = Qb @ U, Vt @ Qa.T, _groups(Z)
    total = torch.zeros_like(Z)
    for t in tasks:
        A, B = x.A[t].to(left.device).double(), x.B[t].to(left.device).double() * x.weights[t]
        answers = left.T @ B  # (R, r): a_t = answers A
        gram = A @ A.T
        sizes = _together(((answers @ gram) * answers).sum(1).clamp(min=0.0), group)
        shared = _together(Z * ((right @ A.T) * answers).sum(1), group)
        floor = NOISE**2 * ((B.T @ B) * gram).sum()
        held = torch.where(sizes > floor, shared / sizes.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        total += held.clamp(min=ALPHA)
    root = (Z * len(tasks) / total).sqrt()
    return replace(merged, A=(root[:, None] * right).float(), B=(left * root).float(), scaling=1.0)


def _groups(Z: Float[Tensor, " k"]) -> Int[Tensor, " k"]:
    """The group of each descending singular value: those next to each other that differ by less than `EQUAL`."""
    return torch.cat([Z.new_zeros(1), (Z[1:] < Z[:-1] * (1 - EQUAL)).to(Z.dtype)]).cumsum(0).long()


def _together(values: Float[Tensor, " k"], group: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Of each value, the sum over its group."""
    return torch.zeros_like(values).index_add(0, group, values)[group]
