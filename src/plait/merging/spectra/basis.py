"""Orthonormal bases of tall matrices: from the Gram matrix where that is as exact as QR or an SVD, by those elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.factors import PartingError
from plait.merging.spectra.small_svd import eigen, gram_of, roots_of, thin_svd

# The largest |D R^-1| for which the Gram matrix is trusted; see `orthonormal`. Of the stacked factors of public adapters it
# is 4 to 900, of random ones about the root of their number of columns, of linearly dependent ones infinite.
_TRUSTED = 1e3


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal columns Q = M C, kept as that product: whoever needs Q X multiplies M by the small C X.

    Of a stack of matrices too, with its dimension in front.

    Args:
        tall: M, (n, R), in the dtype of what it was made from; None for the identity, where Q is C.
        inner: C, (R, k), float64, k <= n.
        dtype: Of what is made with an identity.
    """

    tall: Float[Tensor, "... n R"] | None
    inner: Float[Tensor, "... R k"]
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        """k, the number of columns."""
        return self.inner.shape[-1]

    def columns(self, sizes: Float[Tensor, "... k"] | None = None) -> Float[Tensor, "n k"]:
        """Q itself, or with every column multiplied by a size, in the dtype of M."""
        return self._lifted(self.inner if sizes is None else self.inner * sizes[..., None, :])

    def times(self, X: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
        """Q X, in the dtype of M."""
        return self._lifted(self.inner @ X)

    def rows(self, X: Float[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """X Q^T, in the dtype of M."""
        inner = X @ self.inner.mT
        return inner.to(self.dtype) if self.tall is None else inner.to(self.tall.dtype) @ self.tall.mT

    def _lifted(self, inner: Float[Tensor, "R k"]) -> Float[Tensor, "n k"]:
        return inner.to(self.dtype) if self.tall is None else self.tall @ inner.to(self.tall.dtype)

    def turned(self, U: Float[Tensor, "k j"]) -> Basis:
        """The basis Q U; U has orthonormal columns."""
        return replace(self, inner=self.inner @ U)

    def first(self, k: int) -> Basis:
        """The first k columns."""
        return replace(self, inner=self.inner[..., :k])


def orthonormal(M: Float[Tensor, "... n R"]) -> tuple[Basis, Float[Tensor, "... k R"]]:
    """M = Q T: an orthonormal basis of M's columns, and their coordinates in it, float64; k = min(n, R).

    With the Cholesky factor of the Gram matrix, M^T M = T^T T, Q = M T^-1 is orthonormal, and no tall matrix has to be
    made orthogonal: a fifth of the time of Householder's QR.

    **Error**: let D be the column norms of M and kappa = |D T^-1|, in the Frobenius norm, which is at least one over the
    smallest singular value of M D^-1; columns of any size are alike to Cholesky's method. The Gram matrix is float64, so T is
    exact to 1e-16 kappa^2. What float32 rounds in Q X is 6e-8 kappa |X| at most. Householder's QR in float32 has no less: its
    Q stays orthonormal, but turns from M's columns by as much (measured for kappa from 1 to 1e6, two to four times as much).

    **In the width**: of as many columns as rows, or more, Q is the identity and T is M: no basis has to be found.

    **Fallback**: where kappa exceeds 1e3, or M has zero or dependent columns, Householder's QR in float64: T then tells columns
    apart that differ by 1e-5 of their length (copies of one A that were trained on), which float32 lost among its rounding. What lies
    below the rounding of M's own entries is noise, and for the caller to cut.

    Args:
        M: Of any float dtype that LAPACK knows; any strides; one matrix or a stack.

    Raises:
        PartingError: A stack with a member that falls back.

    Cost: n R^2 multiplications in float64.
    Source: the error of Cholesky's method does not see D: Demmel, LAPACK working note 14, 1989.
    """
    n, R = M.shape[-2:]
    if n <= R:
        axes = torch.eye(n, dtype=torch.float64, device=M.device).expand(*M.shape[:-2], n, n)
        return Basis(None, axes, M.dtype), M.double()
    found = _by_gram(M)
    if found is None and M.ndim > 2:
        raise PartingError
    return found or _by_householder(M)


def spanning(M: Float[Tensor, "n R"]) -> Float[Tensor, "n k"]:
    """Orthonormal columns that span those of M, as `orthonormal` finds them, and by QR in the dtype of M where that falls back.

    For who goes on from the space and not from its coordinates: half the time of QR on a CPU, and a small part of it on a GPU.
    """
    return Q[0].columns() if (Q := _by_gram(M)) is not None else torch.linalg.qr(M)[0]


def principal(M: Float[Tensor, "... n R"]) -> tuple[Basis, Float[Tensor, "... k R"]]:
    """M = Q T as in `orthonormal`, with M's left singular vectors in Q: of M = U S V^T, Q = U and T = S V^T, largest first.

    M^T M = V S^2 V^T gives both, and Q = M (V S^-1): neither a basis nor an SVD comes before. Of as many columns as rows, or more,
    M M^T = U S^2 U^T gives Q = U, orthonormal whatever the singular values, and T = U^T M.

    **Fallback**: `orthonormal` and `thin_svd` of its coordinates, where the Gram matrix is not to be trusted with the small
    singular values, or where float32 is not with Q (S^-1 V^T stands for T^-1 in `orthonormal`, and kappa is the same).

    Args:
        M: As in `orthonormal`.

    Raises:
        PartingError: A stack with a member that falls back.
        LinAlgError: NaN or infinity.

    Cost: n R^2 multiplications and an eigendecomposition of (R, R), float64.
    """
    n, R = M.shape[-2:]
    if n and n <= R:
        wide = M.double()
        U = eigen(gram_of(wide.mT))[1].flip(-1)
        return Basis(None, U, M.dtype), U.mT @ wide
    if (found := _by_eigenvectors(M)) is not None:
        return found
    if M.ndim > 2:
        raise PartingError
    basis, T = orthonormal(M)
    U, S, Vt = thin_svd(T)
    return basis.turned(U), S[:, None] * Vt


def _by_gram(M: Float[Tensor, "... n R"]) -> tuple[Basis, Float[Tensor, "... k R"]] | None:
    """None where a matrix, or any of a stack, is not to be trusted."""
    n, R = M.shape[-2:]
    if not 0 < R <= n:
        return None
    gram = gram_of(M)
    L, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(R, dtype=L.dtype, device=L.device), upper=False).mT
    return (Basis(M, inverse), L.mT) if is_trusted(gram, inverse) else None


def _by_eigenvectors(M: Float[Tensor, "... n R"]) -> tuple[Basis, Float[Tensor, "... k R"]] | None:
    """None where a matrix, or any of a stack, is not to be trusted."""
    n, R = M.shape[-2:]
    if not 0 < R <= n:
        return None
    gram = gram_of(M)
    if (pair := roots_of(gram)) is None:
        return None
    S, V = pair
    inverse = V / S[..., None, :]
    return (Basis(M, inverse), S[..., None] * V.mT) if is_trusted(gram, inverse) else None


def is_trusted(gram: Float[Tensor, "... R R"], inner: Float[Tensor, "... R k"]) -> bool:
    """Whether kappa = |D C| is small enough for Q = M C, in all members; see `orthonormal`.

    Args:
        gram: M^T M.
        inner: C.
    """
    kappa = (gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None] * inner).norm(dim=(-2, -1))
    return bool((kappa <= _TRUSTED).all())  # NaN is not


def _by_householder(M: Float[Tensor, "n R"]) -> tuple[Basis, Float[Tensor, "k R"]]:
    Q, T = torch.linalg.qr(M.double())
    return Basis(Q.to(M.dtype), torch.eye(Q.shape[1], dtype=torch.float64, device=Q.device)), T
