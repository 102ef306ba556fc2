"""Merging on the sphere of directions: SLERP, its many-task form, and the Karcher mean. Only T x T inner products are needed."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.errors import InputError, RunError, UsageError
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import normalised
from plait.merging.registry import merge_method
from plait.merging.spectra.core import gram
from plait.options import Fraction, Range

# Beyond this cosine an arc is a straight line to 1e-7 of its length.
_PARALLEL = 1 - 1e-7
# Norm of a mean of unit vectors, or sine of an angle to the antipode, below which no direction is defined.
_NO_DIRECTION = 1e-6


@merge_method("slerp", paper="Shoemake 1985", ordered_by="t")
def slerp(x: MergeInputs, *, t: Fraction | None = None) -> LoraFactors:
    """Walk the arc between two deltas: (sin((1-t) a) D_1 + sin(t a) D_2) / sin(a), a the angle between them.

    Args:
        x: The module of exactly two tasks.
        t: Position, 0 the first; by default w_2 / (w_1 + w_2), the middle for equal weights.

    Raises:
        UsageError: Not two adapters, or weights that are negative or sum to zero.
        InputError: A zero or an antipodal delta: no arc.

    Cost: copying the factors and two (R, R) Gram matrices.
    Source: Shoemake, SIGGRAPH 1985.
    **Deviates**: a straight line where the cosine exceeds 1 - 1e-7. The lengths are interpolated by the same
    coefficients, as mergekit has it; here the angle is between deltas, not between weights.
    """
    if len(x.tasks) != 2:
        raise UsageError(
            f"slerp joins two adapters, not {len(x.tasks)}", hint="multi_slerp or karcher takes any number"
        )
    shares = _shares(x)
    t = shares[1] if t is None else t
    inner = gram(x.A, x.B)
    if not bool(inner.any()):
        return x.zero()
    cosine = float(_units(x, inner)[0, 1])
    if cosine > _PARALLEL:
        return x.combination([1 - t, t])
    angle = math.acos(max(-1.0, cosine))
    if math.sin(angle) < _NO_DIRECTION:
        raise InputError(
            f"the deltas of {x.tasks[0]!r} and {x.tasks[1]!r} are antipodal: no arc joins them", where=x.module
        )
    return x.combination([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


@merge_method("multi_slerp", paper="Buss and Fillmore 2001")
def multi_slerp(x: MergeInputs, *, tangent: Literal["log", "projected"] = "log") -> LoraFactors:
    """One step of the spherical mean: average in the tangent space at the normalised mean, and map back.

    The result has the weighted mean of the deltas' norms.

    Args:
        x: The module.
        tangent: How unit deltas get into the tangent space: by the logarithmic map, or projected onto it without
            regard to the length of the arc, as mergekit's multislerp does.

    Raises:
        UsageError: Weights that are negative or sum to zero.
        InputError: A zero delta, or unit deltas that cancel.

    Cost: copying the factors and two (R, R) Gram matrices.
    Source: the first iteration of Buss & Fillmore, ACM TOG 2001.
    **Deviates** from mergekit's multislerp unless `tangent` is "projected".
    """
    return _spherical_mean(x, steps=1, tolerance=0.0, projected=tangent == "projected")


@merge_method("karcher", paper="Karcher 1977")
def karcher(
    x: MergeInputs, *, steps: Annotated[int, Range(1, 10000)] = 100, tolerance: Annotated[float, Range(0.0, 1.0)] = 1e-9
) -> LoraFactors:
    """The point on the sphere with the least sum of squared angles to the deltas, with the weighted mean of their norms.

    Args:
        x: The module.
        steps: Most steps taken.
        tolerance: Length of a step, in radians, at which the mean is found.

    Raises:
        UsageError: Weights that are negative or sum to zero.
        InputError: A zero delta, or unit deltas that cancel.

    Cost: copying the factors; the steps are T x T.
    Source: Karcher, CPAM 1977; gradient descent with unit steps.
    """
    return _spherical_mean(x, steps, tolerance)


def _spherical_mean(x: MergeInputs, steps: int, tolerance: float, *, projected: bool = False) -> LoraFactors:
    """In coordinates of the span of the unit deltas, which their Gram matrix gives.

    Coefficients over the deltas themselves would do in exact arithmetic. But where deltas are dependent, what has no
    meaning in them grows from step to step.
    """
    weights = torch.tensor(_shares(x), dtype=torch.float64)
    inner = gram(x.A, x.B)
    if not bool(inner.any()):
        return x.zero()
    norms = inner.diagonal().sqrt().cpu()
    norms[norms == 0] = 1.0  # of those that take no part
    values, vectors = torch.linalg.eigh(_units(x, inner))
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    units = vectors * roots  # (T, k): the unit deltas, as rows
    point = _on_sphere(weights @ units, x)
    for _ in range(steps):
        cosines = (units @ point).clamp(-1.0, 1.0)
        across = units - cosines[:, None] * point
        sines = torch.linalg.vector_norm(across, dim=1)
        angles = torch.atan2(sines, cosines)
        # log map of unit delta u at p: (u - cos p) angle / sin; summed with weights, then the exponential map.
        stretch = torch.where(sines > 1e-12, angles / sines.clamp(min=1e-12), 0.0)
        tangent = (weights if projected else weights * stretch) @ across
        length = float(torch.linalg.vector_norm(tangent))
        if length <= tolerance:
            break
        point = _on_sphere(math.cos(length) * point + math.sin(length) / length * tangent, x)
    coefficients = vectors @ (point / roots)
    return x.combination((coefficients / norms * (weights * norms).sum()).tolist())


def _on_sphere(point: Tensor, x: MergeInputs) -> Tensor:
    norm = float(torch.linalg.vector_norm(point))
    if norm < _NO_DIRECTION:
        raise InputError(
            "the directions of the deltas cancel, so they have no mean", where=x.module, hint="task_arithmetic has one"
        )
    if not math.isfinite(norm):
        raise RunError("a norm is not finite", where=x.module)
    return point / norm


def _units(x: MergeInputs, inner: Tensor) -> Tensor:
    """Cosines between the deltas, on the CPU."""
    norms = inner.diagonal().sqrt()
    for t, (task, norm) in enumerate(zip(x.tasks, norms.tolist(), strict=True)):
        if norm == 0 and not x.weights[t]:
            norms[t] = 1.0  # it takes no part, and needs no direction
        elif norm == 0:
            raise InputError(
                f"the delta of {task!r} is zero here and has no direction",
                where=x.module,
                hint="task_arithmetic merges adapters with different targets",
            )
    return (inner / norms / norms[:, None]).clamp(-1.0, 1.0).cpu()


def _shares(x: MergeInputs) -> list[float]:
    if any(w < 0 for w in x.weights):
        raise UsageError(f"weights {list(x.weights)}: a mean on the sphere takes none below zero")
    return normalised(x.weights)
