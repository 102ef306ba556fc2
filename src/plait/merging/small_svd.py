"""The SVD of a small float64 matrix: by the eigenvectors of its Gram matrix where that is exact enough."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.factors import PartingError

# The smallest eigenvalue of the Gram matrix, of the largest, for which it is trusted; see `thin_svd`.
_TRUSTED = 1e-8


def thin_svd(
    M: Float[Tensor, "... n m"],
) -> tuple[Float[Tensor, "... n k"], Float[Tensor, "... k"], Float[Tensor, "... k m"]]:
    """M = U diag(S) V^T with k = min(n, m), S descending, signs as they come: what `torch.linalg.svd` gives, in half the time.

    M^T M = V diag(S^2) V^T, and U = M V diag(S)^-1.

    **Error**: with kappa = S_1 / S_k, that of S, and how far U is from orthonormal, is about 1e-16 kappa^2; it is trusted
    up to kappa = 1e4, so that 1e-8 remain, less than float32 tells apart.
    **Fallback**: `torch.linalg.svd` above that, so that singular values which are zero or noise come from there always.

    Args:
        M: float64; one matrix or a stack.

    Raises:
        LinAlgError: NaN or infinity.
        PartingError: A stack with a member that falls back.
    """
    n, m = M.shape[-2:]
    if m > n:
        V, S, Ut = thin_svd(M.mT)
        return Ut.mT, S, V.mT
    if m and (pair := roots_of(M.mT @ M)) is not None:
        S, V = pair
        return M @ V / S[..., None, :], S, V.mT
    if M.ndim > 2:
        raise PartingError
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return U, S, Vt


def roots_of(gram: Float[Tensor, "... m m"]) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m m"]] | None:
    """S, descending, and V of a Gram matrix V diag(S^2) V^T; None where it, or one of a stack, is not to be trusted.

    Raises:
        LinAlgError: NaN or infinity.
    """
    values, V = torch.linalg.eigh(gram)
    trusted = bool((values[..., 0] > _TRUSTED * values[..., -1]).all())
    return (values.flip(-1).sqrt(), V.flip(-1)) if trusted else None
