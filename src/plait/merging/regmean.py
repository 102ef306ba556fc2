"""RegMean: the delta whose outputs on every task's inputs are nearest to that task's own, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.errors import RunError
from plait.merging.inputs import MergeInputs
from plait.merging.linear import importances
from plait.merging.registry import Fraction, merge_method

# Share of a task's mean diagonal added to it, in numerator and denominator alike, so that features no token uses leave
# the system solvable; at alpha = 1 a system of few tokens needs more.
_RIDGE, _RIDGE_ALONE = 1e-6, 1e-4


@merge_method("regmean", paper="arXiv:2212.09849", needs=("moments",))
def regmean(x: MergeInputs, *, alpha: Fraction = 0.9, normalised: bool = True) -> LoraFactors:
    """D = (sum_t w_t D_t G_t) (sum_t w_t G_t)^-1, with G_t the inputs' second moment, its off-diagonal times alpha.

    The minimiser of sum_t w_t tr((D - D_t) G_t (D - D_t)^T). An exact LoRA: B = [B_1 .. B_T] and A solves
    (sum_t w_t G_t) A^T = [w_1 G_1 A_1^T .. w_T G_T A_T^T].

    Args:
        x: The module, with moments.
        alpha: What remains of the off-diagonal entries.
        normalised: Divide each task's moments by their trace, so that a task with more tokens weighs no more.

    Returns:
        Exact factors of rank R.

    Cost: R d^2 per task, one Cholesky factorisation of (d, d), R solves.
    Source: Jin et al., ICLR 2023, equation 2 and section 3.2.
    **Deviates**: the moments are usually those of the base model's activations (one file serves every method here);
    the paper uses each fine-tuned model's, which can be collected and passed instead. The paper does not normalise.
    """
    weights = importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and weights[t] != 0.0]
    if not present:
        return x.zero()
    total = x.A[0].new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    turned = []
    for t in present:
        G = _shrunk(x.moments[t].normalised() if normalised else x.moments[t].dense(), alpha).to(
            total.device, torch.float64
        )
        G *= x.weights[t]
        turned.append(x.A[t].double() @ G)
        total += G
    factor, failed = torch.linalg.cholesky_ex(total)
    if bool(failed):
        raise RunError(
            "the weighted sum of the moments is singular or not positive",
            where=x.module,
            hint="weights above zero, alpha below 1, or statistics of more tokens",
        )
    A = torch.cholesky_solve(torch.cat(turned).T, factor).T.to(x.A[0].dtype)
    return LoraFactors(A.contiguous(), torch.cat([x.B[t] for t in present], dim=1), 1.0, x.kind)


def _shrunk(G: Tensor, alpha: float) -> Tensor:
    diagonal = G.diagonal().clone()
    shrunk = G * alpha
    shrunk.diagonal().copy_(diagonal + diagonal.mean() * (_RIDGE if alpha < 1 else _RIDGE_ALONE))
    return shrunk
