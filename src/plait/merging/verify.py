"""Did the merge really happen? Random projections of the result against the same projections of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.dense import DenseDelta, MergedDelta, Truncated
from plait.merging.inputs import MergeInputs
from plait.merging.light.sums import FAILED as FAILED
from plait.seeds import seed_of

_PROBES = 4
# Methods that are no weighted sum are run a second time to be verified: on this many modules.
_RERUN = 3


def some_modules(names: Sequence[str], seed: int) -> list[str]:
    """The few modules on which a method is run a second time."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed_of(seed, "verify"))).tolist()
    return [names[i] for i in order[:_RERUN]]


def probes_of(width: int, generator: torch.Generator) -> Float[Tensor, "in k"]:
    """Random directions of a module's input, of that width; each lies in one piece, as BLAS is fastest with them."""
    return torch.randn(_PROBES, width, dtype=torch.float64, generator=generator).T


def projection_error(
    x: MergeInputs,
    merged: LoraFactors,
    scale: float,
    wanted: Sequence[float] | Callable[[MergeInputs], MergedDelta],
    renormed: bool = False,
) -> float:
    """The relative difference between D X of one module's result and D X recomputed from its inputs, X random.

    Args:
        x: The inputs of the module.
        merged: Its result.
        scale: Of the merge.
        wanted: Coefficients c, where D = sum_t c_t D_t (then the inputs' factors are applied in float64), or the method
            to run again.
        renormed: Whether a calibration set the norm afterwards, so that only directions are compared.

    Returns:
        |P D X - D' X| / |D X|, less what rounding to 16 bits explains, where the result is of those.
        Where the result was cut to a lower rank, P is the projection on the columns of its B: what
        the cut took away is orthogonal to them, and is reported as discarded energy; else P is the identity.
    """
    probes = probes_of(x.shape[1], x.generator("verify"))
    right, rank = _expected(x, wanted, probes)
    right, found = right * scale, _applied(merged, probes)
    size = right.norm()
    if size == 0 or found.norm() == 0:
        return 0.0 if size == found.norm() else 1.0
    if merged.rank < rank:
        basis = torch.linalg.qr(merged.B.double())[0]
        right = basis @ (basis.T @ right)
    if renormed:
        right = right * (found.norm() / right.norm().clamp(min=torch.finfo(torch.float64).tiny))
        size = found.norm()
    return max(0.0, float((right - found).norm() - _rounding(merged, probes)) / float(size))


def _rounding(merged: LoraFactors, probes: Float[Tensor, "in k"]) -> float:
    """The norm that the rounding of factors of 16 bits may have in D X; 0 for wider ones.

    An entry of B is off by at most u of it, and row j of A X by about u (sum_k A_jk^2 X_k^2)^(1/2), of which four times is allowed.
    """
    if merged.B.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    u = torch.finfo(merged.B.dtype).eps / 2
    inner = _times(merged.A, probes).abs() + 4 * _times(merged.A.double().square(), probes.square()).sqrt()
    return u * merged.scaling * float(_times(merged.B.double().abs(), inner).norm())


def _expected(
    x: MergeInputs, wanted: Sequence[float] | Callable[[MergeInputs], MergedDelta], probes: Float[Tensor, "in k"]
) -> tuple[Float[Tensor, "out k"], int]:
    """D X from the inputs, and the rank that D may have."""
    if not callable(wanted):
        ranks = torch.tensor(x.ranks, dtype=torch.int64)
        coefficients = torch.tensor(wanted, dtype=torch.float64).repeat_interleave(ranks)
        inner = _times(torch.cat(x.A), probes)
        return _times(torch.cat(x.B, dim=1), inner * coefficients[:, None]), x.total_rank
    again = wanted(x)
    if isinstance(again, DenseDelta):
        return again.times(probes.float().to(x.device)).cpu().double(), min(again.shape)
    factors = again.factors if isinstance(again, Truncated) else again
    return _applied(factors, probes), factors.rank


def _applied(factors: LoraFactors, probes: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
    return _times(factors.B, _times(factors.A, probes) * factors.scaling)


def _times(M: Float[Tensor, "n m"], X: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """M X in float64; with few columns BLAS is a third faster the other way round."""
    return (X.T @ M.cpu().double().T).T
