"""Eigenvectors at one end of a spectrum: dense where that is quick, block Lanczos where only a few are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread

# Up to this width, or this many times the block, the dense solver is as quick as the iteration (one core: level at widths 768
# and 1536 with blocks of 72 and 136; at six blocks the Krylov space would be the whole one).
DENSE_LIMIT = 256
_DENSE_BLOCKS = 12
# The wanted subspace has settled when it is within this of the true one (Frobenius norm of the sines), as far as its last
# two turns tell: an error that shrinks by q = turn / turn before is now about q times the turn (the first turn says nothing
# of q; taking it for its own q left angles of 4e-4). The residual over the gap bounds the same angle, 50 times too
# cautiously here: a Krylov residual lies far from the wanted end of the spectrum.
ANGLE = 4e-5
# Where the gap is below this fraction of the largest eigenvalue the subspace may never settle; then the energies decide,
# which are of second order: settled when a round gains less than this, relative to the largest.
NO_GAP = 1e-3
ENERGY = 1e-6
SMALL_RESIDUAL = 1e-2
_MAX_STEPS = 240
# Blocks of the Krylov space before it is judged and compressed, and after: eight let typical sites run on to 1e-10.
_BLOCKS, _KEPT = 6, 4
# Columns this dependent are not orthonormalised by Cholesky, whose error grows with the square of their condition.
DEPENDENT_BELOW = 1e-5
VANISHED_BELOW = 1e-10  # what a projection leaves of a column that lay in the space already: rounding
_ROUNDS = 6

# (t, d, b) and which t of the operators -> (t, d, b): operators whose pairs have settled are not applied again.
Operator = Callable[[Float[Tensor, "t d b"], Sequence[int]], Float[Tensor, "t d b"]]


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class Measure:
    """By what pairs are judged, where the operator is another problem in disguise.

    Args:
        energies: Eigenvalues -> the ones whose gaps and sums count; increasing.
        place: (t, d, n) columns -> the columns whose span counts.
    """

    energies: Callable[[Tensor], Tensor] = _as_it_is
    place: Callable[[Tensor], Tensor] = _as_it_is


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """The largest eigenvalues of a batch of symmetric operators.

    Args:
        values: (t, n), descending; at least as many as were asked for.
        vectors: (t, d, n), orthonormal columns in the same order.
        residual: Largest residual norm of a wanted pair.
        converged: Whether every operator met the tolerance.
        steps: Block steps taken; 0 for the dense solver.
        turned: (t,) how far the wanted subspace turned in the last round.
    """

    values: Float[Tensor, "t n"]
    vectors: Float[Tensor, "t d n"]
    residual: float
    converged: bool
    steps: int
    turned: Float[Tensor, " t"]


def dense_eigenpairs(matrices: Float[Tensor, "t d d"], count: int) -> Eigenpairs:
    """Find the largest eigenpairs by a full decomposition. Cost: d^3 each."""
    values, vectors = in_one_thread(torch.linalg.eigh, matrices)
    values, vectors, turned = values.flip(-1), vectors.flip(-1), torch.zeros(len(matrices), dtype=values.dtype)
    return Eigenpairs(values[:, :count], vectors[..., :count], 0.0, True, 0, turned)


def iteration_pays(dim: int, block: int) -> bool:
    """Whether a few eigenpairs of this width come quicker from `top_eigenpairs` than from all of them."""
    return dim > max(DENSE_LIMIT, _DENSE_BLOCKS * block)


def top_eigenpairs(
    operator: Operator, start: Float[Tensor, "t d b"], count: int, measure: Measure | None = None
) -> Eigenpairs:
    """Find the largest eigenvalues of symmetric operators by thick-restart block Lanczos with full reorthogonalisation.

    Every block of the Krylov space is kept up to six of them; then the Ritz pairs are judged and the space is compressed
    to its best Ritz vectors. All operators of a batch advance together, so that a GPU sees few large products, and each
    leaves the batch once its own pairs have settled.

    Args:
        operator: (t, d, b) and the numbers of the t operators -> (t, d, b); symmetric.
        start: Random block; b is the block size and should exceed `count` by some columns.
        count: Number of wanted pairs, below b.
        measure: What they are wanted for; by default the operator's own eigenvalues and space.

    Returns:
        As many Ritz pairs as the block has columns; `converged` says whether the wanted ones have settled to `ANGLE`,
        or to `ENERGY` where the spectrum has no gap after them.

    Cost: per step one application and 4 d b m operations with m at most 6 b.

    Source: Zhou and Saad, Block Krylov-Schur method, Numerical Algorithms 2008; Stewart, SIAM J. Matrix Anal. 2001.
    """
    block = start.shape[-1]
    active = list(range(start.shape[0]))
    V = orthonormal(start)
    images = operator(V, active)
    before: Eigenpairs | None = None
    settled: dict[int, Eigenpairs] = {}
    for step in range(1, _MAX_STEPS + 1):
        Q = orthonormal(images[..., -block:], V)
        if V.shape[-1] >= _BLOCKS * block:
            pairs, done, Y = _ritz(V, images, count, block, step, before, measure or Measure())
            settled |= {t: _only(pairs, [i], converged=True) for i, t in enumerate(active) if done[i]}
            keep = [i for i in range(len(active)) if not done[i]]
            if not keep:
                break
            V, images = V @ Y, images @ Y
            if len(keep) < len(active):
                active, pairs = [active[i] for i in keep], _only(pairs, keep, converged=False)
                V, images, Q = V[keep], images[keep], Q[keep]
            before = pairs
        V = torch.cat([V, Q], -1)
        images = torch.cat([images, operator(Q, active)], -1)
    else:
        assert before is not None  # _MAX_STEPS exceeds _BLOCKS
        settled |= {t: _only(before, [i], converged=False) for i, t in enumerate(active)}
    parts = [settled[t] for t in range(start.shape[0])]
    return Eigenpairs(
        torch.cat([p.values for p in parts]),
        torch.cat([p.vectors for p in parts]),
        max(p.residual for p in parts),
        all(p.converged for p in parts),
        max(p.steps for p in parts),
        torch.cat([p.turned for p in parts]),
    )


def _only(pairs: Eigenpairs, which: Sequence[int], *, converged: bool) -> Eigenpairs:
    index = list(which)
    return replace(
        pairs,
        values=pairs.values[index],
        vectors=pairs.vectors[index],
        turned=pairs.turned[index],
        converged=converged,
    )


def _ritz(
    V: Tensor, images: Tensor, count: int, block: int, step: int, before: Eigenpairs | None, measure: Measure
) -> tuple[Eigenpairs, list[bool], Tensor]:
    """Rayleigh-Ritz in the current space, which operators have settled, and the combinations to keep.

    LAPACK is quicker than a GPU at this size.
    """
    H = V.mT @ images
    values, Y = in_one_thread(torch.linalg.eigh, (0.5 * (H + H.mT)).cpu())
    values, Y = values.flip(-1), Y.flip(-1)[..., : _KEPT * block].to(V.device)
    vectors = V @ Y[..., :block]
    wanted = values[:, :count].to(V.device)
    misfit = images @ Y[..., :count] - vectors[..., :count] * wanted[:, None]
    residuals = torch.linalg.vector_norm(misfit, dim=1).amax(-1).cpu()
    scale = values.abs().amax(-1)
    done, turned = residuals <= 1e-13 * scale, torch.zeros_like(scale)
    if before is not None:
        X, Z = vectors[..., :count], before.vectors[..., :count]
        turned = _turn(X, Z)
        shrinks = (turned / before.turned.clamp_min(1e-12)).clamp(max=1.0)
        settled = turned * shrinks <= ANGLE
        if measure.place is not _as_it_is and bool(settled.any()):
            placed = _turn(orthonormal(measure.place(X)), orthonormal(measure.place(Z)))
            settled &= placed * shrinks <= ANGLE
        now, then = measure.energies(values[:, : count + 1]), measure.energies(before.values[:, :count].cpu())
        gained = (now[:, :count].sum(-1) - then.sum(-1)).abs()
        largest = now.abs().amax(-1)
        no_gap = now[:, count - 1] - now[:, count] < NO_GAP * largest
        settled |= no_gap & (gained <= ENERGY * count * largest)
        done |= settled & (residuals <= SMALL_RESIDUAL * scale)
    pairs = values[:, :block].to(V.device)
    return Eigenpairs(pairs, vectors, float(residuals.max()), bool(done.all()), step, turned), done.tolist(), Y


def _turn(X: Tensor, Z: Tensor) -> Float[Tensor, " t"]:
    """How far apart two batches of subspaces are: the Frobenius norm of the sines, on the CPU."""
    sines: Tensor = torch.linalg.matrix_norm(X - Z @ (Z.mT @ X))
    return sines.cpu()


def orthonormal(W: Float[Tensor, "t d b"], against: Float[Tensor, "t d m"] | None = None) -> Float[Tensor, "t d b"]:
    """Orthonormal columns spanning W's part orthogonal to `against`; where that part vanishes, others orthogonal to it.

    Two rounds: the first loses orthogonality by cancellation where W nearly lies in `against`, the second restores it.
    Where columns vanish or depend on each other, new ones are drawn and two more rounds clean them.
    """
    clean = 0
    for turn in range(_ROUNDS):
        size = torch.linalg.vector_norm(W, dim=-2, keepdim=True)
        if against is not None:
            W = W - against @ (against.mT @ W)
        vanished = torch.linalg.vector_norm(W, dim=-2, keepdim=True) <= VANISHED_BELOW * size
        Q, dependent = _cholesky_q(W)
        if bool(dependent | vanished.any()):  # the one wait for the GPU
            generator = torch.Generator().manual_seed(_ROUNDS * (0 if against is None else against.shape[-1]) + turn)
            drawn = torch.randn(W.shape[-2:], generator=generator, dtype=W.dtype).to(W.device)
            W, clean = in_one_thread(torch.linalg.qr, torch.where(vanished, drawn, W)).Q, 0
            continue
        W, clean = Q, clean + 1
        if clean == 2:
            break
    return W


def _cholesky_q(W: Tensor) -> tuple[Tensor, Tensor]:
    """Q of a thin QR by Cholesky of the Gram matrix, batched on a GPU; and whether columns were too dependent for it."""
    W = W / torch.linalg.vector_norm(W, dim=-2, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    L, info = in_one_thread(torch.linalg.cholesky_ex, W.mT @ W)
    dependent = (info != 0).any() | ~(L.diagonal(dim1=-2, dim2=-1).amin() > DEPENDENT_BELOW)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return W @ inverse.mT, dependent


def fixed_signs(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    """Turn rows so that each one's largest entry is positive; among equals the first decides.

    >>> fixed_signs(torch.tensor([[1.0, -2.0], [3.0, 1.0]])).tolist()
    [[-1.0, 2.0], [3.0, 1.0]]
    """
    largest = rows.abs().argmax(dim=1, keepdim=True)
    return rows * (1 - 2 * (rows.gather(1, largest) < 0).to(rows.dtype))


def orthonormal_rows(columns: Float[Tensor, "d r"]) -> Float[Tensor, "r d"]:
    """Gram-Schmidt of the columns in their order, as rows with fixed signs."""
    return fixed_signs(in_one_thread(torch.linalg.qr, columns).Q.T)
