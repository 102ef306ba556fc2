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
from plait.merging.factors import common_count, factors_of
from plait.merging.spectra.basis import Basis, orthonormal, principal
from plait.merging.spectra.small_svd import significant_svd

# Singular values below this share of the largest are rounding noise of float32 factors, such as those that a second copy
# of a shared A leaves behind.
NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class CoreSpace:
    """Orthonormal bases that span every task's factors, and the tasks' coordinates in them.

    Args:
        left: Q_B, (out, p), p = min(out, R).
        right: Q_A, (in, q), q = min(in, R).
        B: Per task Q_B^T B_t, (p, r_t), float64.
        A: Per task A_t Q_A, (r_t, q), float64.

    Of a stack of modules all of it has their dimension in front.
    """

    left: Basis
    right: Basis
    B: tuple[Float[Tensor, "... p r"], ...]
    A: tuple[Float[Tensor, "... r q"], ...]

    @classmethod
    def of(cls, A: Float[Tensor, "... R in"], B: Float[Tensor, "... out R"], ranks: Sequence[int]) -> CoreSpace:
        """From the tasks' factors: a basis for each kind (see `orthonormal`); all that follows is (R, R) and float64.

        Args:
            A: Of all tasks, one below the other.
            B: Of all tasks, side by side.
            ranks: Of each task.

        Cost:
            R^2 (in + out) multiplications, memory 3 R (in + out).
        """
        # A first: it is A that tasks share where a stack has to be taken apart, and that is then known at half the cost.
        (right, Ta), (left, Tb) = orthonormal(A.mT), orthonormal(B)
        return cls(left, right, torch.split(Tb, list(ranks), dim=-1), torch.split(Ta.mT, list(ranks), dim=-2))

    @classmethod
    def in_svd_basis(
        cls, A: Float[Tensor, "... R in"], B: Float[Tensor, "... out R"], ranks: Sequence[int]
    ) -> CoreSpace:
        """The same space in the basis of the core-space paper: left and right singular vectors of the stacked factors.

        The SVD of [B_1 .. B_T] gives the left basis, that of the stacked A_t the right one. Elementwise rules depend on the basis;
        this one does not depend on the order of the tasks (up to signs, which no rule sees).

        Args:
            A: As in `of`.
            B: As in `of`.
            ranks: As in `of`.

        Cost:
            That of `of`, and two eigendecompositions of (R, R).
        """
        (right, Ta), (left, Tb) = principal(A.mT), principal(B)
        return cls(left, right, torch.split(Tb, list(ranks), dim=-1), torch.split(Ta.mT, list(ranks), dim=-2))

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.A)

    def part(self, task: int) -> Float[Tensor, "p q"]:
        """C_t."""
        return self.B[task] @ self.A[task]

    def parts(self) -> Iterator[Float[Tensor, "p q"]]:
        """C_t of each task, one by one."""
        return (self.part(t) for t in range(self.tasks))

    def combination(self, weights: Sequence[float]) -> Float[Tensor, "p q"]:
        """sum_t w_t C_t."""
        B = torch.cat([b * w for b, w in zip(self.B, weights, strict=True)], dim=-1)
        return B @ torch.cat(self.A, dim=-2)

    def task_svds(self, rank: int | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per task, the singular triplets of C_t without its zeros: U (p, k), S (k,), V (q, k), largest first, k <= rank.

        The QR of its factors comes first, so the SVDs are (r_t, r_t); tasks of one rank go through it together.
        """
        pairs = zip(self.A, self.B, strict=True)
        found: list[tuple[Tensor, Tensor, Tensor]] = [(b, b[..., 0, :0], a.mT) for a, b in pairs]
        for r in {b.shape[-1] for b in self.B} - {0}:
            alike = [t for t, b in enumerate(self.B) if b.shape[-1] == r]
            Qb, Rb = torch.linalg.qr(torch.stack([self.B[t] for t in alike]))
            Qa, Ra = torch.linalg.qr(torch.stack([self.A[t].mT for t in alike]))
            U, S, Vt = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
            U, V = Qb @ U, Qa @ Vt.mT
            full = bool((S[..., :1] * NOISE < S).all()) and (rank is None or rank >= r)
            for t, u, s, v in zip(alike, U, S, V, strict=True):
                k = r if full else min(significant(s), r if rank is None else rank)
                found[t] = (u, s, v) if k == s.shape[-1] else (u[..., :k], s[..., :k], v[..., :k])
        return found

    def factors(self, core: Float[Tensor, "p q"], kind: str = LINEAR) -> LoraFactors:
        """The delta Q_B core Q_A^T as LoRA factors of rank min(p, q)."""
        p, q = core.shape[-2:]
        if p <= q:
            return factors_of(self.right.rows(core), self.left.columns(), kind)
        return factors_of(self.right.columns().mT, self.left.times(core), kind)

    def lifted(self, B: Float[Tensor, "p k"], A: Float[Tensor, "k q"], kind: str = LINEAR) -> LoraFactors:
        """The delta Q_B B A Q_A^T as LoRA factors."""
        return factors_of(self.right.rows(A), self.left.times(B), kind)


def significant(S: Float[Tensor, "... k"], share: float = NOISE) -> int:
    """How many descending singular values exceed `share` of the first.

    Raises:
        PartingError: Not the same number in all members of a stack.
    """
    return common_count(S[..., :1] * share < S)


def polar(M: Float[Tensor, "... n k"]) -> Float[Tensor, "... n k"]:
    """The nearest (partial) isometry U V^T of M = U S V^T: directions whose singular value is noise are left out."""
    U, _, Vt = significant_svd(M, NOISE)
    return U @ Vt


def gram(A: Sequence[Tensor], B: Sequence[Tensor]) -> Float[Tensor, "T T"]:
    """Inner products <D_t, D_u> of all deltas in float64, from the two (R, R) Gram matrices of the factors."""
    stacked_A, stacked_B = torch.cat(list(A)).double(), torch.cat(list(B), dim=1).double()
    return block_sums((stacked_A @ stacked_A.T) * (stacked_B.T @ stacked_B), [a.shape[0] for a in A])


def block_sums(M: Float[Tensor, "R R"], ranks: Sequence[int]) -> Float[Tensor, "T T"]:
    """Sum every (r_t, r_u) block of a matrix whose rows and columns are grouped by task."""
    rows = torch.stack([part.sum(0) for part in torch.split(M, list(ranks))])
    return torch.stack([part.sum(1) for part in torch.split(rows, list(ranks), dim=1)], dim=1)
