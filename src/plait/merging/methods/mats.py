"""MaTS: the delta whose effect on every task's predictions is nearest to that task's own, by both sides of K-FAC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.errors import RunError
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.options import Fraction, Range

if TYPE_CHECKING:
    from plait.statistics.moments import Moments

# Shares of the mean diagonal added to it, as RegMean's are and for the same reason.
_RIDGE, _RIDGE_ALONE = 1e-6, 1e-4
# Residual, as a share of the right-hand side, at which a solve ends; and steps after which it is given up.
_ENOUGH, _MOST = 1e-8, 1000


@merge_method("mats", paper="arXiv:2312.04339", needs=("moments", "output_gradients"))
def mats(
    x: MergeInputs,
    *,
    alpha: Fraction = 0.9,
    solves: Annotated[int, Range(1, 100)] = 2,
    iterations: Annotated[int, Range(1)] | None = None,
    normalised: bool = True,
) -> LoraFactors:
    """D near the minimiser of sum_t w_t tr(G_t (D - D_t) M_t (D - D_t)^T), by conjugate gradients.

    M_t is the second moment of the inputs, G_t that of the gradients at the outputs: their Kronecker product is the K-FAC block of
    task t's Fisher information, so that what is least is how far predictions move. With all G_t alike it is RegMean.

    The minimiser solves sum_t w_t G_t D M_t = sum_t w_t G_t D_t M_t and has full rank. Here D keeps the rank R of the sum: first
    D = Q Y with Q the orthonormal columns of all B_t, and Y solves the system between them; then, the rows of Y held, the columns
    are solved for, and so on in turn. No turn makes the sum larger; where R reaches the outputs the first is exact, where it
    reaches the inputs the second.

    No better than RegMean where it was measured: of five adapters of MiniLM (one seed, 120 rows a task) it keeps 0.83 of the gains
    at its best scale, RegMean 0.85 at its default one.

    Args:
        x: The module, with moments of inputs and of output gradients.
        alpha: What remains of the off-diagonal entries of G_t and M_t.
        solves: Systems that are solved in turn, from 1.
        iterations: Steps of conjugate gradients in each; by default as many as it takes to solve it.
        normalised: Divide G_t and M_t by their traces, so that a task with more tokens or larger losses weighs no more.

    Returns:
        Factors of rank R at most.

    Raises:
        RunError: A system that is not solved in 1000 steps.

    Cost: R d^2 + R^2 d per task and step, d the wider side, some 20 steps a solve; one Cholesky factorisation of (d, d) and of
    (R, R) a solve; T (in^2 + out^2) numbers of float64 in memory.
    Source: Tam, Bansal and Raffel, TMLR 2024 (MaTS with block-diagonal K-FAC).
    **Deviates**: the result has rank R; with full rank it is what the authors' code gives. Gradients are usually those of the base,
    with answers drawn from it and heads drawn for it (the paper: each fine-tuned model's). Each system is solved, with the
    Kronecker product of the sums as its preconditioner (the paper stops plain conjugate gradients early, starting from another
    merge; `iterations` stops early from zero). Traces are divided out, and RegMean's ridge stands on both sides.
    """
    weights = importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and weights[t] != 0.0]
    if not present:
        return x.zero()
    M = [_shrunk(x.moments[t], alpha, normalised, x.device) for t in present]
    G = [_shrunk(x.output_gradients[t], alpha, normalised, x.device) * weights[t] for t in present]
    sides = _Sides(G, M, [(x.B[t].double(), x.A[t].double()) for t in present])
    columns = torch.linalg.qr(torch.cat([x.B[t] for t in present], dim=1).double())[0]
    rows, start = columns, None
    for turn in range(solves):  # D = columns rows; its transpose in every second turn
        if turn:
            sides, (columns, start) = sides.turned(), _turned(columns, rows)
        rows = _solved(sides.between(columns), start, iterations, x.module)
    B, A = (columns, rows) if solves % 2 else (rows.T, columns.T)
    dtype = x.A[0].dtype
    return LoraFactors(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0, x.kind)


@dataclass(frozen=True, slots=True)
class _System:
    """sum_t left_t Y right_t = wanted."""

    left: Sequence[Float[Tensor, "p p"]]
    right: Sequence[Float[Tensor, "q q"]]
    wanted: Float[Tensor, "p q"]

    def times(self, Y: Float[Tensor, "p q"]) -> Float[Tensor, "p q"]:
        """The left-hand side."""
        return torch.stack([a @ Y @ b for a, b in zip(self.left, self.right, strict=True)]).sum(0)


@dataclass(frozen=True, slots=True)
class _Sides:
    """The least squares of a module: metrics of its outputs and of its inputs, and the factors (B_t, A_t) of its deltas."""

    outer: Sequence[Float[Tensor, "o o"]]
    inner: Sequence[Float[Tensor, "i i"]]
    factors: Sequence[tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]]

    def turned(self) -> _Sides:
        """The same of the transposes."""
        return _Sides(self.inner, self.outer, [(a.T, b.T) for b, a in self.factors])

    def between(self, columns: Float[Tensor, "o p"]) -> _System:
        """The system of Y where D = columns Y."""
        parts = zip(self.outer, self.inner, self.factors, strict=True)
        wanted = torch.stack([(columns.T @ g @ b) @ (a @ m) for g, m, (b, a) in parts]).sum(0)
        return _System([columns.T @ g @ columns for g in self.outer], self.inner, wanted)


def _turned(columns: Float[Tensor, "o p"], rows: Float[Tensor, "p i"]) -> tuple[Tensor, Tensor]:
    """The transpose of D = columns rows as orthonormal columns and rows."""
    basis, part = torch.linalg.qr(rows.T)
    return basis, part @ columns.T


def _solved(system: _System, start: Tensor | None, iterations: int | None, module: str) -> Float[Tensor, "p q"]:
    """Solve a system by conjugate gradients, preconditioned by the Kronecker product of the two sums.

    Raises:
        RunError: It is not solved, or not positive.
    """
    left, right = (_cholesky(parts, module) for parts in (system.left, system.right))

    def conditioned(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

    Y = torch.zeros_like(system.wanted) if start is None else start
    residual = system.wanted if start is None else system.wanted - system.times(start)
    bound = _ENOUGH * float(system.wanted.norm())
    direction, energy = torch.zeros_like(Y), 1.0
    for _ in range(iterations or _MOST):
        if float(residual.norm()) <= bound:
            return Y
        steepest = conditioned(residual)
        before, energy = energy, float((residual * steepest).sum())
        direction = steepest + direction * (energy / before)
        image = system.times(direction)
        step = energy / float((direction * image).sum())
        Y, residual = Y + direction * step, residual - image * step
    if iterations is None:
        raise RunError(
            f"conjugate gradients leave {float(residual.norm()) / float(system.wanted.norm()):.1e} after {_MOST} steps",
            where=module,
            hint="alpha below 1, statistics of more tokens, or iterations to stop earlier",
        )
    return Y


def _cholesky(parts: Sequence[Float[Tensor, "n n"]], module: str) -> Float[Tensor, "n n"]:
    found: Tensor
    found, failed = torch.linalg.cholesky_ex(torch.stack(list(parts)).sum(0))
    if bool(failed):
        raise RunError(
            "a weighted sum of moments is singular", where=module, hint="alpha below 1, or statistics of more tokens"
        )
    return found


def _shrunk(moments: Moments, alpha: float, normalised: bool, device: torch.device) -> Float[Tensor, "d d"]:
    """The second moment in float64, its off-diagonal times alpha, with a ridge."""
    S = (moments.normalised(torch.float64) if normalised else moments.dense().double()).to(device)
    diagonal = S.diagonal()
    ridge = (_RIDGE if alpha < 1 else _RIDGE_ALONE) * diagonal.mean()
    return S * alpha + torch.diag((1 - alpha) * diagonal + ridge)
