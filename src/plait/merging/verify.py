"""Did the merge really happen? Random projections of the result against the same projections of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs, seed_of
from plait.merging.stream import DenseDelta, MergedDelta, Truncated

_PROBES = 4
# Methods that are no weighted sum are run a second time to be verified: on this many modules.
_RERUN = 3
# Above this the written adapter is not the merge that was asked for; float32 factors reach about 1e-6.
FAILED = 1e-3


def some_modules(names: Sequence[str], seed: int) -> list[str]:
    """The few modules on which a method is run a second time."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed_of(seed, "verify"))).tolist()
    return [names[i] for i in order[:_RERUN]]


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
        wanted: Coefficients c, where D = sum_t c_t D_t (then B_t (A_t X) is added up in float64), or the method to run again.
        renormed: Whether a calibration set the norm afterwards, so that only directions are compared.

    Returns:
        |P D X - D' X| / |D X|, P the projection on the columns of the result's B: what a cut to a rank took away is
        orthogonal to them, and is reported as discarded energy.
    """
    probes = torch.randn(x.shape[1], _PROBES, dtype=torch.float64, generator=x.generator("verify"))
    right = _expected(x, wanted, probes) * scale
    found = _applied(merged, probes)
    size = right.norm()
    if size == 0 or merged.norm_squared() == 0:
        return 1.0 if size != 0 or found.norm() != 0 else 0.0
    basis = torch.linalg.qr(merged.B.double())[0]
    inside = basis @ (basis.T @ right)
    if renormed:
        inside *= found.norm() / inside.norm().clamp(min=torch.finfo(torch.float64).tiny)
        size = found.norm()
    return float((inside - found).norm() / size)


def _expected(
    x: MergeInputs, wanted: Sequence[float] | Callable[[MergeInputs], MergedDelta], probes: Float[Tensor, "in k"]
) -> Float[Tensor, "out k"]:
    if not callable(wanted):
        total = torch.zeros(x.shape[0], probes.shape[1], dtype=torch.float64)
        for c, a, b in zip(wanted, x.A, x.B, strict=True):
            total += c * (b.cpu().double() @ (a.cpu().double() @ probes))
        return total
    again = wanted(x)
    if isinstance(again, DenseDelta):
        return again.times(probes.float().to(x.device)).cpu().double()
    return _applied(again.factors if isinstance(again, Truncated) else again, probes)


def _applied(factors: LoraFactors, probes: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
    f = factors.folded(torch.float64)
    return f.B @ (f.A @ probes)
