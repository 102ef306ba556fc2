"""Eigenvectors at one end of a spectrum: dense where that is quick, block Lanczos where only a few are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Up to this width the dense solver is as quick as the iteration (2 cores: 0.1 s at 512).
DENSE_LIMIT = 256
# Wanted: residual / gap, the sine of the angle to the true subspace (Davis-Kahan).
ANGLE = 2e-5
# A gap below this fraction of the largest eigenvalue is no gap: then the energies decide, and they are of second order.
NO_GAP = 1e-3
ENERGY = 1e-7
_MAX_STEPS = 240
_CHECK_EVERY = 4
# Columns this dependent are not orthonormalised by Cholesky, whose error grows with the square of their condition.
_DEPENDENT = 1e-6
_ORTHOGONAL = 1e-12

Operator = Callable[[Float[Tensor, "t d b"]], Float[Tensor, "t d b"]]


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """The largest eigenvalues of a batch of symmetric operators.

    Args:
        values: (t, n), descending; at least as many as were asked for.
        vectors: (t, d, n), orthonormal columns in the same order.
        residual: Largest residual norm of a wanted pair.
        converged: Whether every operator met the tolerance.
        steps: Block steps taken; 0 for the dense solver.
    """

    values: Float[Tensor, "t n"]
    vectors: Float[Tensor, "t d n"]
    residual: float
    converged: bool
    steps: int


def dense_eigenpairs(matrices: Float[Tensor, "t d d"], count: int) -> Eigenpairs:
    """The largest eigenpairs by a full decomposition. Cost: d^3 each."""
    values, vectors = torch.linalg.eigh(matrices)
    return Eigenpairs(values.flip(-1)[:, :count], vectors.flip(-1)[..., :count], 0.0, True, 0)


def top_eigenpairs(operator: Operator, start: Float[Tensor, "t d b"], count: int) -> Eigenpairs:
    """The largest eigenvalues of symmetric operators by thick-restart block Lanczos with full reorthogonalisation.

    Every block of the Krylov space is kept up to eight of them; then the space is compressed to its best Ritz vectors.
    All operators of a batch advance together, so that a GPU sees few large products.

    Args:
        operator: (t, d, b) -> (t, d, b), one symmetric operator per batch entry.
        start: Random block; b is the block size and should exceed `count` by some columns.
        count: Number of wanted pairs, below b.

    Returns:
        As many Ritz pairs as the block has columns; `converged` says whether the wanted ones meet `ANGLE` (or `ENERGY`,
        where the spectrum has no gap after them).

    Cost: per step one application and 4 d b m operations with m at most 8 b.

    Source: Zhou and Saad, Block Krylov-Schur method, Numerical Algorithms 2008; Stewart, SIAM J. Matrix Anal. 2001.
    """
    block = start.shape[-1]
    limit, keep = 8 * block, 3 * block
    V = orthonormal(start)
    images = operator(V)
    found = None
    for step in range(1, _MAX_STEPS + 1):
        Q = orthonormal(images[..., -block:], V)
        full = V.shape[-1] + block > limit
        if step % _CHECK_EVERY == 0 or full:
            found, Y = _ritz(V, images, count, block, step, found)
            if found.converged:
                return found
            if full:
                V, images = V @ Y[..., :keep], images @ Y[..., :keep]
        V = torch.cat([V, Q], -1)
        images = torch.cat([images, operator(Q)], -1)
    assert found is not None  # _MAX_STEPS exceeds _CHECK_EVERY
    return found


def _ritz(
    V: Tensor, images: Tensor, count: int, block: int, step: int, before: Eigenpairs | None
) -> tuple[Eigenpairs, Tensor]:
    """Rayleigh-Ritz in the current space; the small problems are solved on the CPU, where LAPACK is quicker."""
    H = V.mT @ images
    values, Y = torch.linalg.eigh((0.5 * (H + H.mT)).cpu())
    values, Y = values.flip(-1).to(V.device), Y.flip(-1).to(V.device)
    wanted = Y[..., :block]
    vectors = V @ wanted
    misfit = images @ wanted[..., :count] - vectors[..., :count] * values[:, None, :count]
    residuals = torch.linalg.vector_norm(misfit, dim=1).amax(-1)
    gaps = values[:, count - 1] - values[:, count]
    scale = values.abs().amax(-1)
    sharp = residuals <= ANGLE * gaps
    blunt = (gaps < NO_GAP * scale) & (residuals <= 1e-3 * scale)
    if before is not None:
        gained = (values[:, :count].sum(-1) - before.values[:, :count].sum(-1)).abs()
        blunt &= gained <= ENERGY * count * scale
    exact = residuals <= 1e-13 * scale
    done = bool((sharp | (blunt & (before is not None)) | exact).all())
    return Eigenpairs(values[:, :block], vectors, float(residuals.max()), done, step), Y


def orthonormal(W: Float[Tensor, "t d b"], against: Float[Tensor, "t d m"] | None = None) -> Float[Tensor, "t d b"]:
    """Orthonormal columns spanning W's part orthogonal to `against`; where that part vanishes, others orthogonal to it.

    Two rounds: the first loses orthogonality by cancellation where W nearly lies in `against`, the second restores it;
    a third where columns had to be invented.
    """
    if against is None:
        return _factor_q(_factor_q(W))
    for step in range(3):
        W = _factor_q(W - against @ (against.mT @ W))
        if step and float((against.mT @ W).abs().max()) < _ORTHOGONAL:
            break
    return W


def _factor_q(W: Tensor) -> Tensor:
    """Q of a thin QR: by Cholesky of the Gram matrix, which is batched on a GPU, and by Householder where that fails."""
    W = W / torch.linalg.vector_norm(W, dim=-2, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    L, info = torch.linalg.cholesky_ex(W.mT @ W)
    if int(info.abs().max()) == 0 and float(L.diagonal(dim1=-2, dim2=-1).min()) > _DEPENDENT:
        solved: Tensor = torch.linalg.solve_triangular(L, W.mT, upper=False)
        return solved.mT
    Q: Tensor = torch.linalg.qr(W).Q
    return Q


def fixed_signs(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    """The same rows with each one's largest entry positive; among equals the first decides."""
    largest = rows.abs().argmax(dim=1, keepdim=True)
    return rows * torch.where(rows.gather(1, largest) < 0, -1.0, 1.0).to(rows)


def orthonormal_rows(columns: Float[Tensor, "d r"]) -> Float[Tensor, "r d"]:
    """Gram-Schmidt of the columns in their order, as rows with fixed signs."""
    return fixed_signs(torch.linalg.qr(columns).Q.T)
