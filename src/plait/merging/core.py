"""The lossless core: every task's delta as a matrix of at most (R, R), exact, in which all spectral methods run.

With orthonormal Q_B spanning all B_t and Q_A spanning all A_t^T, D_t = Q_B C_t Q_A^T and C_t = (Q_B^T B_t)(A_t Q_A), so
norms, inner products and singular values of any combination of deltas are those of the same combination of cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors

# Directions of all factors together whose singular value, relative to the largest after every factor's rows were made
# unit length, is below this are rounding noise of float32 inputs, such as those of a second copy of a shared A.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class CoreSpace:
    """Orthonormal bases that span every task's factors, and the tasks' coordinates in them.

    Args:
        left: Q_B, (out, p), orthonormal columns.
        right: Q_A, (in, q), orthonormal columns.
        B: Per task Q_B^T B_t, (p, r_t).
        A: Per task A_t Q_A, (r_t, q).
    """

    left: Float[Tensor, "out p"]
    right: Float[Tensor, "in q"]
    B: tuple[Float[Tensor, "p r"], ...]
    A: tuple[Float[Tensor, "r q"], ...]

    @classmethod
    def of(cls, A: Sequence[Tensor], B: Sequence[Tensor]) -> CoreSpace:
        """From the tasks' factors, in float64.

        Args:
            A: Per task (r_t, in).
            B: Per task (out, r_t).

        Cost:
            Two Gram matrices (R^2 (in + out) multiplications), their eigen-decompositions (R, R), two products.
        """
        left, right = orthonormal(torch.cat(list(B), dim=1)), orthonormal(torch.cat(list(A)).T)
        return cls(left, right, tuple(left.T @ b.double() for b in B), tuple(a.double() @ right for a in A))

    def part(self, task: int) -> Float[Tensor, "p q"]:
        """C_t."""
        return self.B[task] @ self.A[task]

    def parts(self) -> Iterator[Float[Tensor, "p q"]]:
        """C_t of each task, one by one."""
        return (self.part(t) for t in range(len(self.A)))

    def factors(self, core: Float[Tensor, "p q"], kind: str = LINEAR) -> LoraFactors:
        """The delta Q_B core Q_A^T as float32 LoRA factors, the singular values split evenly between A and B."""
        U, S, Vt = torch.linalg.svd(core, full_matrices=False)
        kept = max(1, int((S[:1] * 1e-12 < S).sum())) if S.numel() else 0
        root = S[:kept].sqrt()
        A, B = (root[:, None] * Vt[:kept]) @ self.right.T, self.left @ (U[:, :kept] * root)
        return LoraFactors(A.float(), B.float(), 1.0, kind)

    def in_svd_basis(self) -> CoreSpace:
        """The same space in the basis of the core-space paper: left and right singular vectors of the stacked factors.

        The SVD of [B_1 .. B_T] = U S W^T gives the left basis U, that of the stacked A_t the right one. Elementwise
        rules depend on the basis; this one does not depend on the order of the tasks (up to signs, which no rule sees).
        """
        U = torch.linalg.svd(torch.cat(self.B, dim=1), full_matrices=False)[0]
        V = torch.linalg.svd(torch.cat(self.A), full_matrices=False)[2].T
        return CoreSpace(self.left @ U, self.right @ V, tuple(U.T @ b for b in self.B), tuple(a @ V for a in self.A))

    def knots(self) -> tuple[Float[Tensor, "out k"], list[Float[Tensor, "k in"]]]:
        """U and the parts S V_t^T of the SVD [D_1 .. D_T] = U S [V_1^T .. V_T^T], in float32.

        Returns:
            U (out, k) and one (k, in) per task, U @ part = D_t; k is the numerical rank at 1e-5 of the largest singular value.
        """
        stacked = torch.cat(list(self.parts()), dim=1)
        U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
        U = U[:, : max(1, int((S[:1] * 1e-5 < S).sum()))]
        return (self.left @ U).float(), [((U.T @ part) @ self.right.T).float() for part in self.parts()]


def orthonormal(M: Float[Tensor, "n R"], tolerance: float = _TOLERANCE) -> Float[Tensor, "n k"]:
    """An orthonormal basis, float64, of the columns' span; columns are scaled to unit length before rank is judged.

    Through the eigen-decomposition of the float64 Gram matrix: as exact as a float32 QR for float32 inputs, several times
    faster for tall matrices, and rank-deficient inputs (a shared A) need no special case.
    """
    M = M.double()
    lengths = M.square().sum(0).sqrt()
    M = M[:, lengths > 0] / lengths[lengths > 0]
    if M.shape[1] == 0:
        return M.new_zeros(M.shape[0], 0)
    values, vectors = torch.linalg.eigh(M.T @ M)
    kept = values > values[-1] * tolerance**2
    kept[: max(0, len(values) - M.shape[0])] = False
    basis: Tensor = M @ (vectors[:, kept] * values[kept].rsqrt())
    return basis
