"""The SVD of a small float64 matrix: by the eigenvectors of its Gram matrix where that is exact enough, or can be made so."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.factors import PartingError, common_count

# The smallest eigenvalue of the Gram matrix, of the largest, for which it is trusted; see `thin_svd`.
_TRUSTED = 1e-8
# How far from orthonormal the vectors of `significant_svd` may be before they are made so: what is left is the square of it.
_MENDED = 1e-3
# Columns of a Gram matrix that are made together; of fewer than two such blocks nothing is gained.
_TOGETHER = 128
# Of a triangle, which has the more to leave out the narrower they are.
_NARROW = 64


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


def significant_svd(
    M: Float[Tensor, "... n m"], share: float
) -> tuple[Float[Tensor, "... n k"], Float[Tensor, "... k"], Float[Tensor, "... k m"]]:
    """M = U diag(S) V^T without the triplets whose value is at most a share of the largest, for who wants the polar factor U V^T.

    M^T M = V diag(S^2) V^T as in `thin_svd`, but for singular values down to 1e-6 of the largest too. U_0 = M V diag(S)^-1 is then
    orthonormal but for D = U_0^T U_0 - 1, and U = U_0 (1 - Y) with Y_ij = D_ij S_i / (S_i + S_j) is so to first order. Of all that are,
    it is the one with M V = U H, H symmetric: U V^T is the polar factor, whatever small vectors rounding has mixed in V.

    **Error**: with kappa = S_1 / S_k, that of U V^T is about 1e-32 kappa^4 where kappa exceeds 1e4 (1e-8 at 1e6) and 1e-16 kappa^2 below,
    where nothing is mended; that of S is 1e-16 S_1 kappa at most. Rounding of M to float32 changes U V^T by 6e-8 kappa.
    **Fallback**: `torch.linalg.svd` where D exceeds 1e-3, as with a share below 3e-7.

    Args:
        M: float64; one matrix or a stack.
        share: 1e-6 or about that.

    Raises:
        LinAlgError: NaN or infinity.
        PartingError: A stack with a member that falls back, or with other numbers of triplets.

    Cost: n m^2 multiplications twice, where small values are mended four times, and an eigendecomposition of (m, m).
    """
    n, m = M.shape[-2:]
    if m > n:
        V, S, Ut = significant_svd(M.mT, share)
        return Ut.mT, S, V.mT
    values, V = eigen(gram_of(M))
    k = common_count(values > values[..., -1:] * share**2)
    S, V = values[..., m - k :].flip(-1).sqrt(), V[..., m - k :].flip(-1)
    U = M @ V / S[..., None, :]
    if k and not bool((S[..., -1] > S[..., 0] * _TRUSTED**0.5).all()):
        D = gram_of(U)
        D.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        if not bool((D.abs().amax((-2, -1)) < _MENDED).all()):
            if M.ndim > 2:
                raise PartingError
            U, S, Vt = torch.linalg.svd(M, full_matrices=False)
            k = common_count(S[:1] * share < S)
            return U[:, :k], S[:k], Vt[:k]
        U = U - U @ (D * (S[..., :, None] / (S[..., :, None] + S[..., None, :])))
    return U, S, V.mT


def eigen(gram: Float[Tensor, "... m m"]) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m m"]]:
    """Give the eigenvalues of a symmetric matrix, ascending, and its eigenvectors: what `torch.linalg.eigh` gives.

    From the upper half on a CPU: torch hands LAPACK the transpose, whose lower half MKL turns into a tridiagonal matrix in a tenth less
    of the whole time, at 256 to 1024 rows.

    Raises:
        LinAlgError: NaN or infinity.
    """
    values, vectors = torch.linalg.eigh(gram, UPLO="U" if gram.device.type == "cpu" else "L")
    return values, vectors


def gram_of(M: Float[Tensor, "... n R"]) -> Float[Tensor, "... R R"]:
    """M^T M, float64.

    It is symmetric: on a CPU the blocks from the diagonal on are multiplied, the others copied, in 0.6 of the time at R = 512.
    """
    wide = M.double()
    return symmetric_product(wide.mT, wide)


def symmetric_product(X: Float[Tensor, "... R n"], Y: Float[Tensor, "... n R"]) -> Float[Tensor, "... R R"]:
    """X Y of which is known that it is symmetric, made exactly so; see `gram_of`."""
    R = Y.shape[-1]
    if Y.device.type != "cpu" or R < 2 * _TOGETHER:
        return X @ Y
    product = Y.new_empty(*Y.shape[:-2], R, R)
    for i in range(0, R, _TOGETHER):
        j = min(i + _TOGETHER, R)
        product[..., i:j, i:] = X[..., i:j, :] @ Y[..., i:]
        product[..., j:, i:j] = product[..., i:j, j:].mT
    return product


def triangular_product(L: Float[Tensor, "... R R"], X: Float[Tensor, "... R k"]) -> Float[Tensor, "... R k"]:
    """L X of a lower triangular L, whose blocks above the diagonal are not multiplied on a CPU: in 0.6 of the time at R = 512."""
    if X.device.type != "cpu" or L.shape[-1] < 2 * _TOGETHER:
        return L @ X
    return torch.cat([L[..., i:j, :j] @ X[..., :j, :] for i, j in _blocks(L)], dim=-2)


def seen_from(L: Float[Tensor, "... R R"], gram: Float[Tensor, "... R R"]) -> Float[Tensor, "... R R"]:
    """L^T G L of a lower triangular L and a symmetric G, made symmetric; in 0.6 of the time as `triangular_product`."""
    if gram.device.type != "cpu" or L.shape[-1] < 2 * _TOGETHER:
        return L.mT @ gram @ L
    half = torch.cat([gram[..., i:] @ L[..., i:, i:j] for i, j in _blocks(L)], dim=-1)
    product = torch.empty_like(half)
    for i, j in _blocks(L):
        product[..., i:j, i:] = L[..., i:, i:j].mT @ half[..., i:, i:]
        product[..., j:, i:j] = product[..., i:j, j:].mT
    return product


def _blocks(L: Float[Tensor, "... R R"]) -> list[tuple[int, int]]:
    return [(i, min(i + _NARROW, L.shape[-1])) for i in range(0, L.shape[-1], _NARROW)]


def roots_of(gram: Float[Tensor, "... m m"]) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m m"]] | None:
    """S, descending, and V of a Gram matrix V diag(S^2) V^T; None where it, or one of a stack, is not to be trusted.

    Raises:
        LinAlgError: NaN or infinity.
    """
    values, V = eigen(gram)
    trusted = bool((values[..., 0] > _TRUSTED * values[..., -1]).all())
    return (values.flip(-1).sqrt(), V.flip(-1)) if trusted else None
