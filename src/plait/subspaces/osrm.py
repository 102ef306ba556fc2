"""Directions the other tasks hardly use: the paper's subspace, and the one its authors' code computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.base import named_seed
from plait.errors import InputError
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import DENSE_LIMIT, fixed_signs, top_eigenpairs

_EXTRA = 8


@subspace_method("osrm", paper="arXiv:2505.22934", needs=("moments", "own", "others"))
def osrm(x: SiteInputs) -> Mapping[str, Basis]:
    """The r eigenvectors of the others' second moment with the smallest eigenvalues: min tr(A m_o A^T), A A^T = I.

    Equal eigenvalues leave the choice open: a null space where the others have fewer inputs than d, above all. Inside the
    tied space the directions of most own-task energy are taken, in that order, and the record says how many were tied.

    Returns:
        Orthonormal rows; energies tr(a m_o a^T) per row, smallest first.

    Raises:
        InputError: The task's own inputs do not reach r directions of the tied space: any basis would be arbitrary.

    Cost: one Cholesky and inverse per site and task; where the others are factors of fewer than d rows, two thin SVDs.

    Source: arXiv:2505.22934, section 3. **Deviates**: the second moment is uncentred and trace-normalised per task, and
    is of tokens unless the statistics were pooled by mean, as the paper's H is.
    """
    return {task: _osrm_one(x, task) for task in x.tasks}


def _osrm_one(x: SiteInputs, task: str) -> Basis:
    names = x.other_tasks(task)
    factor = x.other_factor(task)
    if factor is not None:
        found = _in_null_space(x, task, factor, x.resolution([*names, task]))
        if found is not None:
            return found
    M = x.others(task)
    tolerance = x.resolution(names or [task]) * float(torch.linalg.matrix_norm(M))
    if x.dim > max(DENSE_LIMIT, 4 * (x.rank + _EXTRA)):
        quick = _by_inverse_iteration(x, M, tolerance)
        if quick is not None:
            return quick
    return _with_ties(x, task, M, tolerance)


def _by_inverse_iteration(x: SiteInputs, M: Tensor, tolerance: float) -> Basis | None:
    """The smallest eigenvectors as the largest of (M + shift)^-1; None where they are tied or do not settle."""
    shifted = M.clone()
    shifted.diagonal().add_(tolerance)
    L, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        return None
    generator = torch.Generator().manual_seed(named_seed(0, x.name))
    start = torch.randn(1, x.dim, x.rank + _EXTRA, generator=generator, dtype=torch.float64).to(x.device)
    inverse = torch.cholesky_inverse(L)
    pairs = top_eigenpairs(lambda Y, _: inverse @ Y, start, x.rank)
    values = 1 / pairs.values[0] - tolerance
    if not pairs.converged or float(values[x.rank] - values[x.rank - 1]) <= tolerance:
        return None
    rows = fixed_signs(pairs.vectors[0, :, : x.rank].T)
    energies = ((rows @ M) * rows).sum(1)
    return Basis(
        rows, energies, {"solver": "block lanczos", "steps": pairs.steps, "residual": pairs.residual, "tied": 0}
    )


def _with_ties(x: SiteInputs, task: str, M: Tensor, tolerance: float) -> Basis:
    """By a full decomposition; the eigenvalues within `tolerance` of the r-th smallest are one tied space."""
    values, vectors = torch.linalg.eigh(M)
    edge = float(values[x.rank - 1])
    below = int((values < edge - tolerance).sum())
    tied = int((values <= edge + tolerance).sum()) - below
    record: dict[str, Any] = {"solver": "eigh", "tied": tied if tied > x.rank - below else 0}
    if not record["tied"]:
        rows = fixed_signs(vectors[:, : x.rank].T)
        return Basis(rows, values[: x.rank], record)
    certain, space = vectors[:, :below], vectors[:, below : below + tied]
    own = x.own(task)
    energies, directions = torch.linalg.eigh(space.T @ own @ space)
    wanted = x.rank - below
    _require_energy(x, task, energies.flip(0), wanted)
    rows = fixed_signs(torch.cat([certain, space @ directions.flip(1)[:, :wanted]], 1).T)
    return Basis(rows, ((rows @ M) * rows).sum(1), record)


def _in_null_space(x: SiteInputs, task: str, factor: Float[Tensor, "k d"], resolution: float) -> Basis | None:
    """The tied space is the others' null space: take the own factor's largest directions in it, all in thin form."""
    _, s, Vt = torch.linalg.svd(factor, full_matrices=False)
    Q = Vt[s.square() > resolution * s.square().sum()]
    tied = x.dim - Q.shape[0]
    if tied < x.rank:
        return None
    moments = x.moments[task].to(x.device)
    if moments.form == "factor" and moments.residual is None:
        own = moments.second.double() / moments.trace**0.5
        inside = own - (own @ Q.T) @ Q
        _, s, directions = torch.linalg.svd(inside - (inside @ Q.T) @ Q, full_matrices=False)
        energies, rows = s.square(), directions
    else:
        m = x.own(task)
        m = m - Q.T @ (Q @ m)
        m = m - (m @ Q.T) @ Q
        values, vectors = torch.linalg.eigh(0.5 * (m + m.T))
        energies, rows = values.flip(0), vectors.flip(1).T
    _require_energy(x, task, energies, x.rank)
    rows = fixed_signs(rows[: x.rank])
    return Basis(rows, (rows @ factor.T).square().sum(1), {"solver": "null space", "tied": tied})


def _require_energy(x: SiteInputs, task: str, energies: Tensor, wanted: int) -> None:
    reached = int((energies > x.resolution([task])).sum())
    if reached < wanted:
        raise InputError(
            f"the others leave a tied space in which task {task!r} has energy in {reached} directions, {wanted} are wanted",
            where=x.name,
            hint="collect more samples, or a lower rank: any other basis would be arbitrary",
        )


@subspace_method("osrm_released", paper="arXiv:2505.22934", needs=("means", "others"))
def osrm_released(x: SiteInputs) -> Mapping[str, Basis]:
    """What the authors' code computes: the last r rows of V^T in the full SVD of the other tasks' mean inputs.

    One vector per other task, its mean over samples and over all positions, pads included; T - 1 of them leave a null
    space of d - T + 1 directions, of which LAPACK's completion fills the last r rows: nearly the same for all tasks.
    Kept for comparison; it ignores ties by design, and only its span means anything.

    Raises:
        InputError: The statistics hold no mean over padded positions, or T - 1 > d - r.

    Source: github.com/illidanlab/OSRM, utils.py.
    """
    found = {}
    for task in x.tasks:
        names = x.other_tasks(task)
        if len(names) > x.dim - x.rank:
            raise InputError(f"{len(names)} other tasks leave no {x.rank} directions of width {x.dim}", where=x.name)
        H = torch.stack([_padded_mean(x, name) for name in names])
        Vt = torch.linalg.svd(H, full_matrices=True).Vh
        rows = Vt[-x.rank :]
        found[task] = Basis(rows, (H @ rows.T).square().sum(0), {"solver": "svd", "tied": x.dim - len(names)})
    return found


def _padded_mean(x: SiteInputs, task: str) -> Float[Tensor, " d"]:
    moments = x.moments[task]
    if moments.padded_total is None or not moments.padded_count:
        raise InputError(f"the statistics of task {task!r} hold no mean over padded positions", where=x.name)
    return moments.padded_total.cpu().double() / moments.padded_count  # on the CPU: the completion is LAPACK's
