"""Directions the other tasks hardly use: the paper's subspace, and the one its authors' code computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.border.counts import plural
from plait.errors import InputError
from plait.seeds import named_seed
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import fixed_signs, iteration_pays, top_eigenpairs

EXTRA_COLUMNS = 8


@subspace_method("osrm", paper="arXiv:2505.22934", needs=("moments", "own", "others"))
def osrm(x: SiteInputs) -> Mapping[str, Basis]:
    """Find the r eigenvectors of the others' second moment with the smallest eigenvalues: min tr(A m_o A^T), A A^T = I.

    Equal eigenvalues leave the choice open: a null space where the others have fewer inputs than d, above all. Inside the
    tied space the directions of most own-task energy are taken, in that order, and the record says how many were tied.

    Where the own inputs reach fewer of them than are wanted (short texts of few distinct tokens, at the embeddings), the
    rest are eigenvectors with the next larger eigenvalues that the own inputs do reach, ties among them treated alike;
    the record says how many rows were `completed` so.

    Returns:
        Orthonormal rows; energies tr(a m_o a^T) per row, smallest first.

    Raises:
        InputError: The task's own inputs span fewer than r directions: any basis would be arbitrary.

    Cost: one Cholesky and inverse per site and task; where the others are factors of fewer than d rows, two thin SVDs;
    a full decomposition where there are other ties.

    Source: arXiv:2505.22934, section 3. **Deviates**: the second moment is uncentred and trace-normalised per task, and
    is of tokens unless the statistics were pooled by mean, as the paper's H is. Completed rows are not the minimum, which
    any directions that nobody's inputs reach attain: those would be arbitrary, and a row of A without inputs never trains.
    """
    return {task: _osrm_one(x, task) for task in x.tasks}


def _osrm_one(x: SiteInputs, task: str) -> Basis:
    names = x.other_tasks(task)
    factor = x.other_factor(task)
    if factor is not None:
        basis = _in_null_space(x, task, factor, x.resolution([*names, task]))
        if basis is not None:
            return basis
    M = x.others(task)
    tolerance = x.resolution(names or [task]) * float(torch.linalg.matrix_norm(M))
    if iteration_pays(x.dim, x.rank + EXTRA_COLUMNS):
        quick = _by_inverse_iteration(x, M, tolerance)
        if quick is not None:
            return quick
    return _with_ties(x, task, M, tolerance)


def _by_inverse_iteration(x: SiteInputs, M: Tensor, tolerance: float) -> Basis | None:
    """The smallest eigenvectors as the largest of (M + shift)^-1; None where they are tied or do not settle."""
    shifted = M.clone()
    shifted.diagonal().add_(tolerance)
    L, info = in_one_thread(torch.linalg.cholesky_ex, shifted)
    if int(info) != 0:
        return None
    generator = torch.Generator().manual_seed(named_seed(0, x.name))
    start = torch.randn(1, x.dim, x.rank + EXTRA_COLUMNS, generator=generator, dtype=torch.float64).to(x.device)
    inverse = in_one_thread(torch.cholesky_inverse, L)
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
    values, vectors = in_one_thread(torch.linalg.eigh, M)
    edge = float(values[x.rank - 1])
    below = int((values < edge - tolerance).sum())
    tied = int((values <= edge + tolerance).sum()) - below
    record: dict[str, Any] = {"solver": "eigh", "tied": tied if tied > x.rank - below else 0}
    if not record["tied"]:
        rows = fixed_signs(vectors[:, : x.rank].T)
        return Basis(rows, values[: x.rank], record)
    own = x.own(task)
    reached = _reached(x, task, own, vectors[:, below : below + tied])
    columns = torch.cat([vectors[:, :below], reached], 1)[:, : x.rank]
    if missing := x.rank - columns.shape[1]:
        _require_span(x, task, own)
        more = _next_smallest(x, task, own, (values, vectors), below + tied, tolerance, missing)
        columns, record["completed"] = torch.cat([columns, more], 1), missing
    rows = fixed_signs(columns.T)
    return Basis(rows, ((rows @ M) * rows).sum(1), record)


def _next_smallest(
    x: SiteInputs, task: str, own: Tensor, pairs: tuple[Tensor, Tensor], start: int, tolerance: float, wanted: int
) -> Float[Tensor, "d wanted"]:
    """Eigenvectors from number `start` on, eigenvalues ascending, that the own inputs reach; tied ones as one space."""
    values, vectors = pairs
    reached = vectors[:, :0]
    while reached.shape[1] < wanted:
        if start >= x.dim:
            raise _too_few(x, task)
        stop = start + int((values[start:] <= values[start] + tolerance).sum())
        reached = torch.cat([reached, _reached(x, task, own, vectors[:, start:stop])], 1)
        start = stop
    return reached[:, :wanted]


def _reached(x: SiteInputs, task: str, own: Tensor, space: Float[Tensor, "d k"]) -> Float[Tensor, "d n"]:
    """The directions of a space in which the own inputs have energy, the most first."""
    energies, directions = in_one_thread(torch.linalg.eigh, space.T @ own @ space)
    count = int((energies > x.resolution([task])).sum())
    basis: Tensor = space @ directions.flip(1)[:, :count]
    return basis


def _in_null_space(x: SiteInputs, task: str, factor: Float[Tensor, "k d"], resolution: float) -> Basis | None:
    """The tied space is the others' null space: take the own factor's largest directions in it, all in thin form.

    None where the null space, or what the own inputs reach of it, is too small.
    """
    _, s, Vt = in_one_thread(torch.linalg.svd, factor, full_matrices=False)
    Q = Vt[s.square() > resolution * s.square().sum()]
    tied = x.dim - Q.shape[0]
    if tied < x.rank:
        return None
    moments = x.moments[task].to(x.device)
    if moments.form == "factor" and moments.residual is None:
        own = moments.second.double() / moments.trace**0.5
        inside = own - (own @ Q.T) @ Q
        _, s, directions = in_one_thread(torch.linalg.svd, inside - (inside @ Q.T) @ Q, full_matrices=False)
        energies, rows = s.square(), directions
    else:
        m = x.own(task)
        m = m - Q.T @ (Q @ m)
        m = m - (m @ Q.T) @ Q
        values, vectors = in_one_thread(torch.linalg.eigh, 0.5 * (m + m.T))
        energies, rows = values.flip(0), vectors.flip(1).T
    if int((energies > x.resolution([task])).sum()) < x.rank:
        return None
    rows = fixed_signs(rows[: x.rank])
    return Basis(rows, (rows @ factor.T).square().sum(1), {"solver": "null space", "tied": tied})


def _require_span(x: SiteInputs, task: str, own: Tensor) -> None:
    if int((in_one_thread(torch.linalg.eigvalsh, own) > x.resolution([task])).sum()) < x.rank:
        raise _too_few(x, task)


def _too_few(x: SiteInputs, task: str) -> InputError:
    return InputError(
        f"the inputs of task {task!r} span fewer than {plural(x.rank, 'direction')}",
        where=x.name,
        hint="collect more samples, or a lower rank: any other basis would be arbitrary",
    )


@subspace_method("osrm_released", paper="arXiv:2505.22934", needs=("means", "others"))
def osrm_released(x: SiteInputs) -> Mapping[str, Basis]:
    """Compute what the authors' code computes: the last r rows of V^T in the full SVD of the other tasks' mean inputs.

    One vector per other task, its mean over samples and over all positions, pads included; T - 1 of them leave a null
    space of d - T + 1 directions, of which LAPACK's completion fills the last r rows: nearly the same for all tasks.
    Kept for comparison; it ignores ties by design, and only its span means anything.

    Raises:
        InputError: The statistics hold no mean over padded positions, or T - 1 > d - r.

    Source: github.com/illidanlab/OSRM, utils.py.
    """
    bases = {}
    for task in x.tasks:
        names = x.other_tasks(task)
        if len(names) > x.dim - x.rank:
            raise InputError(
                f"{plural(len(names), 'other task', 'leaves', 'leave')} no {plural(x.rank, 'direction')} of width {x.dim}",
                where=x.name,
            )
        H = torch.stack([_padded_mean(x, name) for name in names])
        Vt = in_one_thread(torch.linalg.svd, H, full_matrices=True).Vh
        rows = Vt[-x.rank :]
        bases[task] = Basis(rows, (H @ rows.T).square().sum(0), {"solver": "svd", "tied": x.dim - len(names)})
    return bases


def _padded_mean(x: SiteInputs, task: str) -> Float[Tensor, " d"]:
    moments = x.moments[task]
    if moments.padded_total is None or not moments.padded_count:
        raise InputError(f"the statistics of task {task!r} hold no mean over padded positions", where=x.name)
    return moments.padded_total.cpu().double() / moments.padded_count  # on the CPU: the completion is LAPACK's
