"""Core Space merging: an elementwise rule on the cores C_t."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors
from plait.merging.entries.elementwise import signed_mean, weighted_sum
from plait.merging.entries.largest_elected import largest_elected
from plait.merging.entries.quantile import smallest_kept
from plait.merging.entries.random_masks import Place, kept_at_random
from plait.merging.entries.tiles import Products
from plait.merging.inputs import MergeInputs
from plait.merging.methods.ties import trimmed
from plait.merging.registry import merge_method
from plait.merging.spectra.core import NOISE
from plait.merging.spectra.small_svd import significant_svd
from plait.options import Density


@merge_method("core_space", paper="arXiv:2509.17786", stacks=True)
def core_space(
    x: MergeInputs,
    *,
    rule: Literal["ties", "dare_ties", "dare_linear", "sum"] = "ties",
    density: Density = 0.3,
    isotropic: bool = False,
) -> LoraFactors:
    """An elementwise rule on the tasks' cores in the SVD basis: merged = U_B rule(C_1 .. C_T) V_A^T.

    U_B are the left singular vectors of [B_1 .. B_T], V_A the right ones of the stacked A_t, C_t = U_B^T D_t V_A.

    Args:
        x: The module.
        rule: What is done to the entries of the cores; "sum" equals task_arithmetic.
        density: Fraction of each core's entries kept.
        isotropic: Whether the merged core's singular values are then replaced by their mean.

    Returns:
        Exact factors of rank at most R.

    Cost: SVDs of (R, R).
    Source: Panariello et al., NeurIPS 2025, section 3; their TSV and Iso in this space are `tsv` and `iso_c` here.
    **Deviates**: scalings are folded into B before the SVD. The basis, and so the result, depends on how a delta is
    split between A and B. With repeated singular values the basis is not unique.
    """
    if x.total_rank == 0:
        return x.zero()
    core = x.svd_core
    # Entries in the dtype of the factors, float32, are half the work; small singular values that become large need float64.
    kind = torch.float64 if isotropic else x.A[0].dtype
    B, A = ([part.to(kind) for part in parts] for parts in (core.B, core.A))
    parts = (b @ a for b, a in zip(B, A, strict=True))
    if rule == "ties":
        if x.members:
            trim = trimmed([smallest_kept(part, density) for part in parts], x.weights)
            merged = trim((b @ a for b, a in zip(B, A, strict=True)), Place("core"))
        else:
            merged = largest_elected(Products.of(B, A), density, x.weights, x.modules)
    elif rule == "sum":
        merged = weighted_sum(core.parts(), x.weights)
    else:
        kept = kept_at_random(x, density)(parts, Place("core"))
        merged = signed_mean(kept, x.weights) if rule == "dare_ties" else weighted_sum(kept, x.weights)
    merged = merged.double()
    return core.factors(_flattened(merged) if isotropic else merged, x.kind)


def _flattened(core: Tensor) -> Tensor:
    U, S, Vt = significant_svd(core, NOISE)
    return (U @ Vt) * S.mean(-1)[..., None, None] if S.numel() else core
