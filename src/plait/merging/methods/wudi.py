"""WUDI: the delta whose difference from each task's is smallest along that task's own inputs, in closed form."""

from __future__ import annotations

import torch

from plait.adapters.lora import LoraFactors
from plait.merging.inputs import MergeInputs
from plait.merging.methods.linear import importances
from plait.merging.registry import merge_method


@merge_method("wudi", paper="arXiv:2503.08099")
def wudi(x: MergeInputs) -> LoraFactors:
    """Minimise sum_t w_t |(D - D_t) D_t^T|^2 / |D_t|^2 over D: D = (sum D_t D_t^T D_t / n_t) (sum D_t^T D_t / n_t)^+.

    The rows of D_t stand in for the task's inputs; n_t = |D_t|^2 / w_t.

    Cost: one eigen-decomposition of (R, R) in the lossless core.
    Source: Cheng et al., ICML 2025, equation 8.
    **Deviates**: the minimum in closed form, the one of least norm; the authors descend 300 steps from the sum.
    """
    importances(x.weights)
    core = x.core
    left = x.A[0].new_zeros(core.left.width, core.right.width, dtype=torch.float64)
    right = left.new_zeros(core.right.width, core.right.width)
    for t, weight in enumerate(x.weights):
        part = core.part(t)
        size = part.square().sum()
        if size > 0:
            own = part.T @ part * (weight / size)
            left += part @ own
            right += own
    values, vectors = torch.linalg.eigh(right)
    strength = values.abs()
    kept = strength > strength.max() * 1e-10 if len(values) else strength > 0
    if not bool(kept.any()):
        return x.zero()
    return core.factors(left @ (vectors[:, kept] / values[kept]) @ vectors[:, kept].T, x.kind)
