"""Did the merge really happen? Random projections of the result against the same projections of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.dense import DenseDelta, MergedDelta, Truncated
from plait.merging.inputs import MergeInputs
from plait.seeds import seed_of

_PROBES = 4
# Methods that are no weighted sum are run a second time to be verified: on this many modules.
_RERUN = 3
# Above this the written adapter is not the merge that was asked for; float32 factors reach about 1e-6.
FAILED = 1e-3
# A weighted sum is first compared in float32; an error above this is looked at again in float64, for sums that nearly cancel.
_DOUBTFUL = 1e-5


def some_modules(names: Sequence[str], seed: int) -> list[str]:
    """The few modules on which a method is run a second time."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed_of(seed, "verify"))).tolist()
    return [names[i] for i in order[:_RERUN]]


def sum_error(parts: Sequence[tuple[float, LoraFactors]], merged: LoraFactors, probes: Float[Tensor, "in k"]) -> float:
    """The relative difference between D X and sum_t c_t D_t X, from the factors as they were read; nothing is copied.

    Args:
        parts: Coefficient (the scale included) and factors of each input.
        merged: The result, not cut to a lower rank.
        probes: X, random.
    """
    found = 1.0
    for dtype in (torch.float32, torch.float64):
        X = probes.to(dtype)
        wanted, got = _summed(parts, X), _summed([(1.0, merged)], X)
        size = wanted.norm()
        if size == 0 or not bool(got.any()):
            return 0.0 if size == got.norm() else 1.0
        found = float((wanted - got).norm() / size)
        if found <= _DOUBTFUL:
            break
    return found


def _summed(parts: Sequence[tuple[float, LoraFactors]], X: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
    rows = X.T
    total = torch.zeros(len(rows), parts[0][1].shape[0], dtype=X.dtype)  # transposed, as in `_times`
    for c, f in parts:
        inner = torch.nn.functional.linear(rows, f.A.to("cpu", X.dtype))
        total.addmm_(inner, f.B.to("cpu", X.dtype).T, alpha=c * f.scaling)
    return total.T


def probes_of(width: int, generator: torch.Generator) -> Float[Tensor, "in k"]:
    """Random directions of a module's input, of that width; each lies in one piece, as BLAS is fastest with them."""
    return torch.randn(_PROBES, width, dtype=torch.float64, generator=generator).T


def probes_by_width(modules: Mapping[str, LoraFactors], seed: int) -> dict[int, Float[Tensor, "in k"]]:
    """Width of the input -> directions that all modules of that width share: drawing them takes longer than using them."""
    generators = {
        w: torch.Generator().manual_seed(seed_of(seed, "probes", w)) for w in {f.shape[1] for f in modules.values()}
    }
    return {width: probes_of(width, generator) for width, generator in generators.items()}


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
        |P D X - D' X| / |D X|. Where the result was cut to a lower rank, P is the projection on the columns of its B: what
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
    return float((right - found).norm() / size)


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
