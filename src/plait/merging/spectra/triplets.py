"""Every task's singular triplets, made orthogonal to those of the others: products of small matrices with the stacked factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.factors import PartingError
from plait.merging.inputs import MergeInputs
from plait.merging.spectra.basis import Basis, is_trusted
from plait.merging.spectra.core import NOISE, polar, significant
from plait.merging.spectra.small_svd import gram_of, roots_of, symmetric_product

# Per task, its top singular triplets: K with U_t = B_t K (or V_t = A_t^T K), (r_t, k) each, and S_t, (k,).
_Triplets = tuple[list[Tensor], list[Tensor], list[Tensor]]


def orthogonal_triplets(x: MergeInputs, most: int | None = None) -> tuple[Basis, tuple[Tensor, ...], Basis]:
    """The polar factors of [U_1 .. U_T] and [V_1 .. V_T], and S_1 .. S_T, where D_t = U_t diag(S_t) V_t^T without its zeros.

    With B_t^T B_t = R_t^T R_t and A_t A_t^T = Q_t^T Q_t, the SVD of R_t Q_t^T = u diag(S_t) v^T is (r_t, r_t), and U_t = B_t K_t with
    K_t = R_t^-1 u. Then [U_1 .. U_T] = B K, whose polar factor is B K (K^T B^T B K)^-1/2: but for that root, all of it is blocks of
    one task.

    **Error**: that of `orthonormal` with K (K^T B^T B K)^-1/2, and R_t^-1 of each task, in the place of T^-1.
    **Fallback**: QR and SVDs in the lossless core, where that is not to be trusted; as with vectors that depend on each other, whose
    polar factor is a partial isometry.

    Args:
        x: One module, or a stack; at least one task has rank.
        most: How many triplets of a task count, the largest; by default all.

    Returns:
        Two `Basis` (n, m) and the values of each task (k_t,), largest first; m is the sum of the k_t.

    Raises:
        PartingError: A stack with a member that falls back, or with other numbers of nonzero values.

    Cost:
        R^2 (in + out) multiplications and two eigendecompositions of (R, R), float64.
    """
    if (found := _by_gram(x, most)) is not None:
        return found
    if x.members:
        raise PartingError
    triplets = x.core.task_svds(most)
    U, V = (polar(torch.cat([triplet[i] for triplet in triplets], dim=-1)) for i in (0, 2))
    return x.core.left.turned(U), tuple(s for _, s, _ in triplets), x.core.right.turned(V)


def _by_gram(x: MergeInputs, most: int | None) -> tuple[Basis, tuple[Tensor, ...], Basis] | None:
    """None where a module, or any of a stack, is not to be trusted."""
    if not 0 < x.total_rank < min(x.shape):  # from there on the core is the deltas themselves
        return None
    A, B = x.side_by_side
    left, right = gram_of(B), gram_of(A.mT)
    if (triplets := _of_tasks(left, right, x.ranks, most)) is None:
        return None
    K, S, L = triplets
    U, V = _polar(B, left, K, x.ranks), _polar(A.mT, right, L, x.ranks)
    return None if U is None or V is None else (U, tuple(S), V)


def _of_tasks(
    left: Float[Tensor, "... R R"], right: Float[Tensor, "... R R"], ranks: Sequence[int], most: int | None
) -> _Triplets | None:
    """From the Gram matrices of B and of A^T; tasks of one rank go through it together."""
    K, S, L = ([none] * len(ranks) for none in (left[..., :0, :0], left[..., 0, :0], left[..., :0, :0]))
    for r in set(ranks) - {0}:
        alike = [t for t, rank in enumerate(ranks) if rank == r]
        starts = [sum(ranks[:t]) for t in alike]
        roots = []
        for gram in (left, right):
            blocks = torch.stack([gram[..., i : i + r, i : i + r] for i in starts])
            root, failed = torch.linalg.cholesky_ex(blocks, upper=True)
            inverse = torch.linalg.solve_triangular(
                root, torch.eye(r, dtype=root.dtype, device=root.device), upper=True
            )
            if bool(failed.any()) or not is_trusted(blocks, inverse):
                return None
            roots.append((root, inverse))
        (Rb, inverse_b), (Ra, inverse_a) = roots
        U, values, Vt = torch.linalg.svd(Rb @ Ra.mT)
        full = bool((values[..., :1] * NOISE < values).all()) and (most is None or most >= r)
        for t, u, s, v in zip(alike, inverse_b @ U, values, inverse_a @ Vt.mT, strict=True):
            k = r if full else min(significant(s), r if most is None else most)
            K[t], S[t], L[t] = u[..., :k], s[..., :k], v[..., :k]
    return K, S, L


def _polar(
    M: Float[Tensor, "... n R"],
    gram: Float[Tensor, "... R R"],
    K: Sequence[Float[Tensor, "... r k"]],
    ranks: Sequence[int],
) -> Basis | None:
    """The polar factor of M diag(K_1 .. K_T); None where it is not to be trusted."""
    sizes = [k.shape[-1] for k in K]
    if not sum(sizes):
        return None
    half = torch.cat([k.mT @ rows for k, rows in zip(K, torch.split(gram, list(ranks), dim=-2), strict=True)], dim=-2)
    whole = torch.cat(
        [columns @ k for k, columns in zip(K, torch.split(half, list(ranks), dim=-1), strict=True)], dim=-1
    )
    if (pair := roots_of(whole)) is None:
        return None
    S, V = pair
    root = symmetric_product(V / S[..., None, :], V.mT)
    inner = torch.cat([k @ rows for k, rows in zip(K, torch.split(root, sizes, dim=-2), strict=True)], dim=-2)
    return Basis(M, inner) if is_trusted(gram, inner) else None
