"""The SVD of a weighted sum of deltas, from Gram matrices of the stacked factors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.factors import PartingError
from plait.merging.inputs import MergeInputs
from plait.merging.spectra.basis import Basis, is_trusted
from plait.merging.spectra.core import NOISE
from plait.merging.spectra.small_svd import gram_of, roots_of, seen_from, significant_svd, triangular_product


def svd_of_sum(x: MergeInputs) -> tuple[Basis, Float[Tensor, "... k"], Basis]:
    """sum_t w_t D_t = U diag(S) V^T: U (out, k) and V (in, k) with orthonormal columns, S descending, k <= R.

    The sum is B W A with W = diag(w). With A A^T = L L^T, H = L^T W (B^T B) W L = X S^2 X^T has its singular values squared, and
    V = A^T (L^-T X), U = B (W L X S^-1): one Cholesky factor and one eigendecomposition, where a basis for either side and an
    SVD of the core between them would be two and three products more.

    **Error**: as by way of the core. L^-T X is T^-1 of `orthonormal` but for a rotation, and so is W L X S^-1 on the side of B,
    so kappa is the same for both; S is as exact as that of `thin_svd`, which squares the core.
    **Fallback**: `significant_svd` in the lossless core, where either is not to be trusted (dependent factors, weights of zero, singular
    values that are zero or noise, which are left out), and where the ranks add up to the width, so that the core is the sum itself.

    Args:
        x: One module, or a stack.

    Raises:
        PartingError: A stack with a member that falls back.
        LinAlgError: NaN or infinity.

    Cost: R^2 (in + out) multiplications and an eigendecomposition of (R, R), float64.
    """
    if (answer := _by_gram(x)) is not None:
        return answer
    if x.members:
        raise PartingError
    U, S, Vt = significant_svd(x.core.combination(x.weights), NOISE)
    return x.core.left.turned(U), S, x.core.right.turned(Vt.mT)


def _by_gram(x: MergeInputs) -> tuple[Basis, Float[Tensor, "... R"], Basis] | None:
    """None where a module, or any of a stack, is not to be trusted."""
    if not 0 < x.total_rank < min(x.shape) or 0.0 in x.weights:
        return None
    A, B = x.side_by_side
    # A first: it is A that tasks share where a stack has to be taken apart, and that is then known at half the cost.
    inside = gram_of(A.mT)
    L, failed = torch.linalg.cholesky_ex(inside)
    if bool(failed.any()):
        return None
    weights = [w for w, rank in zip(x.weights, x.ranks, strict=True) for _ in range(rank)]
    weighted = L * torch.tensor(weights, dtype=L.dtype, device=L.device)[:, None]
    outside = gram_of(B)
    if (pair := roots_of(seen_from(weighted, outside))) is None:
        return None
    S, X = pair
    right, left = torch.linalg.solve_triangular(L.mT, X, upper=True), triangular_product(weighted, X) / S[..., None, :]
    if not is_trusted(inside, right) or not is_trusted(outside, left):
        return None
    return Basis(B, left), S, Basis(A.mT, right)
