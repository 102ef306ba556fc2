"""KnOTS' alignment: the SVD of all deltas side by side, from Gram matrices of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.spectra.small_svd import eigen, gram_of

# Singular values above this share of the largest count.
_SHARE = 1e-5
# Eigenvalues of A_t A_t^T below this share of the largest are rounding noise of float32 rows that depend on each other.
_NOISE = 1e-13


@dataclass(frozen=True, slots=True)
class Aligned:
    """U and the parts S V_t^T of [D_1 .. D_T] = U S [V_1^T .. V_T^T], each as a product: U part_t = D_t.

    Args:
        left: U, (out, k), in the dtype of the factors; k counts singular values above 1e-5 of the largest.
        parts: Per task (k, r_t): S V_t^T is that times A_t.
    """

    left: Float[Tensor, "out k"]
    parts: tuple[Float[Tensor, "k r"], ...]

    @classmethod
    def of(cls, A: Sequence[Float[Tensor, "r in"]], B: Sequence[Float[Tensor, "out r"]]) -> Aligned:
        """Align tasks by their factors; at least one has rank.

        With A_t A_t^T = E L E^T, D_t = W_t N_t, where W_t = B_t E L^1/2 and N_t = L^-1/2 E^T A_t has orthonormal rows. So
        U and S are those of W = [W_1 .. W_T], which has R columns however many tasks there are, and U^T D_t = (U^T W_t) N_t. They
        come from the eigenvectors of W^T W, or of W W^T where that is smaller: float64 squares still tell 1e-5 of the
        largest singular value from rounding.

        Cost: R^2 out multiplications in float64 and an eigendecomposition of min(R, out) rows.
        """
        roots, inverses = _roots(A)
        W = torch.cat([b.double() @ root for b, root in zip(B, roots, strict=True)], dim=1)
        tall = W.shape[1] <= W.shape[0]
        values, vectors = eigen(gram_of(W if tall else W.mT))
        k = max(1, int((values > values[-1:] * _SHARE**2).sum()))
        S, X = values.flip(0)[:k].clamp_min(0).sqrt(), vectors.flip(1)[:, :k]
        U = W @ (X / torch.where(S > 0, S, 1.0)) if tall else X
        coordinates = S[:, None] * X.mT if tall else U.mT @ W
        own = torch.split(coordinates, [a.shape[0] for a in A], dim=1)
        parts = tuple((c @ inverse).to(A[0].dtype) for c, inverse in zip(own, inverses, strict=True))
        return cls(U.to(A[0].dtype), parts)


def _roots(A: Sequence[Float[Tensor, "r in"]]) -> tuple[list[Tensor], list[Tensor]]:
    """Per task, E L^1/2 and L^-1/2 E^T of A_t A_t^T = E L E^T, float64; tasks of one rank together."""
    roots = [a.new_zeros(0, 0, dtype=torch.float64) for a in A]
    inverses = list(roots)
    for rank in {a.shape[0] for a in A} - {0}:
        alike = [t for t, a in enumerate(A) if a.shape[0] == rank]
        stacked = torch.stack([A[t] for t in alike]).double()
        values, E = torch.linalg.eigh(stacked @ stacked.mT)
        size = values.clamp_min(0).sqrt()
        inverse = torch.where(values > _NOISE * values[:, -1:], 1 / size, 0.0)
        for t, root, back in zip(alike, E * size[:, None], inverse[..., None] * E.mT, strict=True):
            roots[t], inverses[t] = root, back
    return roots, inverses
