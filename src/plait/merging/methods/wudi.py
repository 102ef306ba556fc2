"""WUDI: the delta whose difference from each task's is smallest along that task's own inputs, in closed form; and filtered."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method
from plait.options import Density, Positive

# Eigenvalues below this share of the largest are noise.
_NOISE = 1e-10


@merge_method("wudi", paper="arXiv:2503.08099")
def wudi(x: MergeInputs) -> LoraFactors:
    """Minimise sum_t w_t |(D - D_t) D_t^T|^2 / |D_t|^2 over D: D = (sum D_t D_t^T D_t / n_t) (sum D_t^T D_t / n_t)^+.

    The rows of D_t stand in for the task's inputs; n_t = |D_t|^2 / w_t.

    Cost: one eigen-decomposition of (R, R) in the lossless core.
    Source: Cheng et al., ICML 2025, equation 8.
    **Deviates**: the minimum in closed form, the one of least norm; the authors descend 300 steps from the sum.
    """
    core = x.core
    left, values, vectors = _equations(x, importances(x.weights))
    strength = values.abs()
    kept = strength > strength.max() * _NOISE if len(values) else strength > 0
    if not bool(kept.any()):
        return x.zero()
    return core.factors(left @ (vectors[:, kept] / values[kept]) @ vectors[:, kept].T, x.kind)


@merge_method("swudi", paper="arXiv:2606.07289")
def swudi(x: MergeInputs, *, time: Positive | None = None, share: Density | None = None) -> LoraFactors:
    """WUDI's minimum along the strong directions only, the sum of the deltas along the weak ones.

    D = T V (1 - f) V^T + N V (f / l) V^T with V diag(l) V^T = sum_t D_t^T D_t / n_t, N = sum_t D_t D_t^T D_t / n_t,
    n_t = |D_t|^2 / w_t and T the sum of the deltas. The exact inverse (`wudi`) divides noise by the smallest l; a filter f of
    0 leaves what a descent from the sum would have left.

    Args:
        x: The module.
        time: Filter f = 1 - exp(-l time) within the strong directions, as after that much descent; none by default: f = 1.
        share: Strong directions as a share of the core's width; by default their number is (sum sqrt l)^2 / sum l.

    Cost: one eigen-decomposition of (R, R) in the lossless core.
    Source: SWUDI (both options given) and ASWUDI (neither), 2026; the authors' default for LoRA is the second.
    **Deviates**: directions are counted within the core, whose width is R, and not within the width of the layer, of which most
    have no energy at all. Weights are relative to their mean in the sum as well.
    """
    core = x.core
    count = sum(w != 0.0 for w in x.weights)
    weights = [w * count / sum(x.weights) for w in importances(x.weights)]
    left, values, vectors = _equations(x, weights)
    values = values.clamp(min=0.0)
    if not bool((values > 0).any()):
        return x.zero()
    if share is None:
        roots = values.sqrt()
        strong = math.ceil(float(roots.sum() ** 2 / values.sum()) * (1 - 1e-9))
    else:
        strong = math.ceil(share * len(values) - 1e-9)
    kept = values > values.max() * _NOISE
    kept[: len(values) - min(strong, len(values))] = False
    part, levels = vectors[:, kept], values[kept]
    filtered = torch.ones_like(levels) if time is None else 1 - torch.exp(-levels * time)
    summed = core.combination(weights)
    merged = summed - (summed @ part * filtered) @ part.T + (left @ part * (filtered / levels)) @ part.T
    return core.factors(merged, x.kind)


def _equations(
    x: MergeInputs, weights: Sequence[float]
) -> tuple[Float[Tensor, "p q"], Float[Tensor, " q"], Float[Tensor, "q q"]]:
    """N, and the eigenvalues and vectors of sum_t D_t^T D_t / n_t, smallest first; in the core."""
    core = x.core
    left = x.A[0].new_zeros(core.left.width, core.right.width, dtype=torch.float64)
    right = left.new_zeros(core.right.width, core.right.width)
    for t, weight in enumerate(weights):
        part = core.part(t)
        size = part.square().sum()
        if size > 0:
            own = part.T @ part * (weight / size)
            left += part @ own
            right += own
    values, vectors = torch.linalg.eigh(right)
    return left, values, vectors
