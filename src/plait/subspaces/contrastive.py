"""Directions a task uses much and the others little: generalised eigenvectors of own against other moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.one_thread import in_one_thread
from plait.border.counts import plural
from plait.errors import InputError
from plait.options import Positive, Range
from plait.seeds import named_seed
from plait.statistics.moments import FACTOR, Moments
from plait.subspaces.inputs import Basis, SiteInputs
from plait.subspaces.registry import subspace_method
from plait.subspaces.solvers import (
    Eigenpairs,
    Measure,
    Operator,
    dense_eigenpairs,
    iteration_pays,
    orthonormal_rows,
    top_eigenpairs,
)

# Tasks are solved together as long as their float64 matrices fit in this much memory.
BATCH_BYTES = 7 << 30
THIN_ROWS = 1024  # the n x n eigen-problem of more inputs takes longer than the iteration
EXTRA_COLUMNS = 8  # columns of a block beyond those wanted: they make the gap


@subspace_method("contrastive", needs=("moments", "own", "others"), row_norm="gaussian")
def contrastive(x: SiteInputs, *, rho: Positive = 0.001) -> Mapping[str, Basis]:
    """Find the r directions of most own energy per unit of other energy.

    Attains the maximum over A of tr[(A R A^T)^-1 A m_t A^T], R = m_o + rho/d I, which is the sum of the r largest
    generalised eigenvalues; the value depends on the span alone, so it survives orthonormalisation and the row norm.

    One Cholesky factor per site serves every task. With P and c of `SiteInputs.pencil`, c R = (P + c rho/d I) - m_t, so
    the eigenvectors of (m_t, P + c rho/d I) are those of (m_t, R), in the same order, with l = c mu / (1 - mu).

    Args:
        x: One site of all tasks.
        rho: Ridge, in units of the mean eigenvalue 1/d of a trace-normalised moment.

    Returns:
        Rows orthonormalised in order; energies are the generalised eigenvalues l, largest first.

    Raises:
        InputError: A task's inputs span fewer than r directions here.

    Cost: one Cholesky and one triangular inverse per site, 2/3 d^3; some 20 products of d x d with 16 columns per task, or
    n d^2 + n^2 d for a task of n < d / 2 inputs.

    Source: Fukunaga and Koontz 1970; common spatial patterns (Koles 1991); Xiang et al., SC-LoRA, arXiv:2505.23724 is
    the nearest prior in LoRA.
    """
    P, c = x.pencil()
    P.diagonal().add_((c or 1.0) * rho / x.dim)
    whitener = inverse_factor(P)
    del P
    bases = {t: _solved_thin(x, t, whitener, c) for t in x.tasks if _is_thin(x.moments[t])}
    rest = [t for t in x.tasks if t not in bases]
    size = max(1, BATCH_BYTES // (8 * x.dim**2))
    for start in range(0, len(rest), size):
        bases |= _solved(x, rest[start : start + size], whitener, c)
    return bases


@subspace_method("contrastive_permuted", needs=("moments", "own", "others"), row_norm="gaussian")
def contrastive_permuted(x: SiteInputs, *, rho: Positive = 0.001) -> Mapping[str, Basis]:
    """Contrastive with the statistics of the wrong tasks: each gets the subspace of the next task by name (a control)."""
    order = sorted(x.moments)
    wrong = {t: order[(order.index(t) + 1) % len(order)] for t in x.tasks}
    bases = contrastive(replace(x, tasks=tuple(wrong.values())), rho=rho)
    return {t: replace(bases[u], record={**bases[u].record, "statistics_of": u}) for t, u in wrong.items()}


@subspace_method("sc_lora", paper="arXiv:2505.23724", needs=("moments", "own", "others"))
def sc_lora(x: SiteInputs, *, beta: Annotated[float, Range(0.0, 1.0)] = 0.5) -> Mapping[str, Basis]:
    """Find the r directions of most (1 - beta) own minus beta other energy.

    Args:
        x: One site of all tasks.
        beta: Weight of the others, from 0 (own alone) to 1.

    Source: arXiv:2505.23724, equation of the reward. **Deviates**: B = 0 and the base is untouched, where SC-LoRA starts
    from the base's own part in the subspace; moments are trace-normalised, and the others' are those of known tasks.
    """
    return {task: _sc_lora_one(x, task, beta) for task in x.tasks}


def _sc_lora_one(x: SiteInputs, task: str, beta: float) -> Basis:
    difference = x.own(task).mul_(1 - beta).sub_(x.others(task), alpha=beta)
    pairs = largest_pairs(x, lambda Y, _: difference @ Y, lambda: difference[None], 1)
    return Basis(orthonormal_rows(pairs.vectors[0, :, : x.rank]), pairs.values[0, : x.rank], solver_record(pairs))


def inverse_factor(R: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Invert the Cholesky factor: L^-1 with R = L L^T, in float64.

    Raises:
        InputError: R is not positive definite.
    """
    L, info = in_one_thread(torch.linalg.cholesky_ex, R)
    if int(info) != 0:
        raise InputError("the moments are not positive semidefinite", hint="a damaged file? plait stats check")
    eye = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    inverse: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse


def _is_thin(moments: Moments) -> bool:
    """Whether a task has so few inputs that all its eigenpairs come from them.

    That is also where the iteration is worst: outside the span of few other inputs l is large, mu crowds at 1.
    """
    rows = moments.second.shape[0]
    return moments.form == FACTOR and moments.residual is None and rows <= min(moments.dim // 2, THIN_ROWS)


def _solved_thin(x: SiteInputs, task: str, whitener: Tensor, c: float) -> Basis:
    """From the n x n matrix F P^-1 F^T of the own factor F, which has the same eigenvalues but zero."""
    moments = x.moments[task]
    if not moments.trace > 0:
        x.own(task)  # which names what is wrong
    F = moments.second.to(x.device, torch.float64) / moments.trace**0.5
    if len(F) < x.rank:
        raise _too_few(x, task)
    G = F @ whitener.T
    values, vectors = in_one_thread(torch.linalg.eigh, (G @ G.T).cpu())
    mu, vectors = values.flip(0)[: x.rank], vectors.flip(1)[:, : x.rank]
    rows = orthonormal_rows((whitener.T @ (G.T @ vectors.to(x.device))).cpu())
    weakest = float(in_one_thread(torch.linalg.svdvals, F.cpu() @ rows.T)[-1]) ** 2
    if weakest <= x.resolution([task]):
        raise _too_few(x, task)
    return Basis(rows, _energies(mu, c), {"solver": "thin", "steps": 0, "residual": 0.0})


def _energies(mu: Tensor, c: float) -> Tensor:
    """The generalised eigenvalues l that belong to mu; where there is only background they are the same."""
    mu = mu.clamp(max=1.0)
    return c * mu / (1 - mu).clamp_min(1e-15) if c else mu


def _too_few(x: SiteInputs, task: str) -> InputError:
    return InputError(
        f"the inputs of task {task!r} span fewer than {plural(x.rank, 'direction')}",
        where=x.name,
        hint="collect more samples",
    )


def _solved(x: SiteInputs, tasks: Sequence[str], whitener: Tensor, c: float) -> dict[str, Basis]:
    own = torch.empty(len(tasks), x.dim, x.dim, dtype=torch.float64, device=x.device)
    for i, task in enumerate(tasks):
        own[i] = x.own(task)

    def operator(Y: Tensor, active: Sequence[int]) -> Tensor:
        Z = _apply(whitener.T, Y)
        every = len(active) == len(tasks)
        images = own @ Z if every else torch.stack([own[t] @ z for t, z in zip(active, Z, strict=True)])
        return _apply(whitener, images)

    measure = Measure(lambda mu: _energies(mu, c), lambda Y: _apply(whitener.T, Y))
    pairs = largest_pairs(x, operator, lambda: whitener @ own @ whitener.T, len(tasks), measure)
    # The thin rest is quicker on the CPU than in many small steps of a GPU.
    rows = [orthonormal_rows(z) for z in (whitener.T @ pairs.vectors[..., : x.rank]).cpu()]
    placed = torch.stack(rows).to(x.device)
    weakest = in_one_thread(torch.linalg.eigvalsh, (placed @ own @ placed.mT).cpu())[:, 0].tolist()
    energies = _energies(pairs.values[:, : x.rank].cpu(), c)
    for task, energy in zip(tasks, weakest, strict=True):
        if energy <= x.resolution([task]):
            raise _too_few(x, task)
    return {t: Basis(rows[i], energies[i], solver_record(pairs)) for i, t in enumerate(tasks)}


def _apply(A: Float[Tensor, "d d"], Y: Float[Tensor, "t d b"]) -> Float[Tensor, "t d b"]:
    """A Y for a whole batch as one product with all its columns side by side."""
    t, d, b = Y.shape
    return (A @ Y.transpose(0, 1).reshape(d, t * b)).view(d, t, b).transpose(0, 1)


def largest_pairs(
    x: SiteInputs, operator: Operator, matrices: Callable[[], Tensor], count: int, measure: Measure | None = None
) -> Eigenpairs:
    """Find the r largest eigenpairs of a site: dense where it is small or the iteration does not settle.

    Args:
        x: The site, for its width, rank and device.
        operator: `count` symmetric operators at once.
        matrices: The same as (count, d, d), where they are decomposed whole.
        count: Number of operators.
        measure: By what pairs are judged.
    """
    if iteration_pays(x.dim, x.rank + EXTRA_COLUMNS):
        generator = torch.Generator().manual_seed(named_seed(0, x.name))
        start = torch.randn(1, x.dim, x.rank + EXTRA_COLUMNS, generator=generator, dtype=torch.float64)
        pairs = top_eigenpairs(operator, start.to(x.device).expand(count, -1, -1), x.rank, measure)
        if pairs.converged:
            return pairs
    return dense_eigenpairs(matrices(), x.rank)


def solver_record(pairs: Eigenpairs) -> dict[str, object]:
    """Say how eigenpairs were found, for a basis's record."""
    name = "block lanczos" if pairs.steps else "eigh"
    return {"solver": name, "steps": pairs.steps, "residual": pairs.residual}
