"""RegMean: the delta whose outputs on every task's inputs are nearest to that task's own, in closed form."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.errors import RunError
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.options import Fraction

if TYPE_CHECKING:
    from plait.statistics.moments import Moments

# Share of a task's mean diagonal added to it, in numerator and denominator alike, so that features no token uses leave
# the system solvable; at alpha = 1 a system of few tokens needs more.
_RIDGE, _RIDGE_ALONE = 1e-6, 1e-4
# Sites whose systems are kept: as many as may be in work at once.
_KEPT = 4


@merge_method("regmean", paper="arXiv:2212.09849", needs=("moments",))
def regmean(x: MergeInputs, *, alpha: Fraction = 0.9, normalised: bool = True) -> LoraFactors:
    """D = (sum_t w_t D_t G_t) (sum_t w_t G_t)^-1, with G_t the inputs' second moment, its off-diagonal times alpha.

    The minimiser of sum_t w_t tr((D - D_t) G_t (D - D_t)^T). An exact LoRA: B = [B_1 .. B_T] and A solves
    (sum_t w_t G_t) A^T = [w_1 G_1 A_1^T .. w_T G_T A_T^T].

    Args:
        x: The module, with moments.
        alpha: What remains of the off-diagonal entries.
        normalised: Divide each task's moments by their trace, so that a task with more tokens weighs no more.

    Returns:
        Exact factors of rank R.

    Cost: R d^2 per task, one Cholesky factorisation of (d, d), R solves.
    Source: Jin et al., ICLR 2023, equation 2 and section 3.2.
    **Deviates**: the moments are usually those of the base model's activations (one file serves every method here);
    the paper uses each fine-tuned model's, which can be collected and passed instead. The paper does not normalise, and has no ridge: here
    1e-6 of each task's mean diagonal (1e-4 at alpha = 1) stands in numerator and denominator alike, 1e-5 of the result.
    """
    weights = importances(x.weights)
    present = [t for t, rank in enumerate(x.ranks) if rank and weights[t] != 0.0]
    if not present:
        return x.zero()
    tasks = [_Shrunk.of(x.moments[t], weights[t], alpha, normalised) for t in present]
    factor = x.over_model(_systems).system(tasks).factor(x)
    turned = torch.cat([task.applied(x.A[t]) for t, task in zip(present, tasks, strict=True)])
    A = torch.cholesky_solve(turned.T.to(factor), factor).T.to(x.A[0].dtype)
    return LoraFactors(A.contiguous(), torch.cat([x.B[t] for t in present], dim=1), 1.0, x.kind)


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """w G_t = off * S + diag(extra), with S the moments as they are stored: no copy of S is made."""

    S: Float[Tensor, "d d"]
    off: float
    extra: Float[Tensor, " d"]

    @classmethod
    def of(cls, moments: Moments, weight: float, alpha: float, normalised: bool) -> _Shrunk:
        S = moments.dense()
        if normalised:
            weight /= moments.trace or float(moments.normalised().trace())  # which says why a trace of zero is an error
        diagonal = S.diagonal().double()
        ridge = _RIDGE if alpha < 1 else _RIDGE_ALONE
        return cls(S, weight * alpha, weight * ((1 - alpha) * diagonal + ridge * diagonal.mean()))

    def applied(self, A: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """W A G_t, float64."""
        product = A.to(self.S.device, self.S.dtype) @ self.S
        return product.double() * self.off + A.to(self.extra) * self.extra

    def add_to(self, total: Float[Tensor, "d d"]) -> None:
        """Total += w G_t."""
        total.add_(self.S, alpha=self.off)
        total.diagonal().add_(self.extra)


def _systems(modules: Sequence[MergeInputs]) -> _Systems:
    """Begin without any: modules of one merge share what the first of a site has factorised."""
    return _Systems()


class _Systems:
    """The factorised systems of the last sites: modules that read one site (q, k and v) share theirs.

    A system is known by the addresses of its moments, which are held with it: an address says nothing once its tensor
    is gone.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[Any, _System] = {}

    def system(self, tasks: Sequence[_Shrunk]) -> _System:
        """The system of these tasks, factorised or not."""
        key = tuple((task.S.data_ptr(), task.off) for task in tasks)
        with self.lock:
            found = self.kept.setdefault(key, _System(tasks))
            while len(self.kept) > _KEPT:
                self.kept.pop(next(k for k in self.kept if k != key))
        return found


class _System:
    """sum_t w_t G_t and its Cholesky factor, computed once, by the first thread that asks."""

    def __init__(self, tasks: Sequence[_Shrunk]) -> None:
        self.tasks, self.lock = tasks, threading.Lock()
        self.found: Tensor | None = None

    def factor(self, x: MergeInputs) -> Float[Tensor, "d d"]:
        """The lower factor, float64."""
        with self.lock:
            if self.found is None:
                total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=self.tasks[0].S.device)
                for task in self.tasks:
                    task.add_to(total)
                found, failed = torch.linalg.cholesky_ex(total.to(x.device))
                if bool(failed):
                    hint = "alpha below 1, or statistics of more tokens"
                    raise RunError("the weighted sum of the moments is singular", where=x.module, hint=hint)
                self.found = found
        return self.found
