"""TSV-M: keep each task's top singular triplets and make the tasks' singular vectors orthogonal to each other."""

from __future__ import annotations

from typing import Annotated

import torch

from plait.adapters.lora import LoraFactors
from plait.merging.factors import factors_of
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.merging.spectra.triplets import orthogonal_triplets
from plait.options import Range


@merge_method("tsv", paper="arXiv:2412.00081", stacks=True)
def tsv(x: MergeInputs, *, triplets: Annotated[int, Range(1)] | None = None) -> LoraFactors:
    """Stack every task's top k singular triplets and replace the stacked U and V by their polar factors.

    With D_t = U_t S_t V_t^T cut to k, U = [w_1 U_1 .. ], the merge is polar(U) diag(S_1 .. S_T) polar(V)^T; weights
    multiply the S_t.

    Args:
        x: The module.
        triplets: k; by default each task's own rank, which loses nothing.

    Cost: SVDs of (r_t, r_t) and two eigendecompositions of (R, R).
    Source: Gargiulo et al., CVPR 2025, algorithm 1.
    **Deviates**: k is the LoRA's rank and not 1/T of min(out, in), so no vector of a zero singular value enters (they
    change the polar factor). Where the stacked vectors are linearly dependent, as with one A shared by all tasks, the
    polar factor is a partial isometry: the authors' SVD completes it with arbitrary vectors.
    """
    if x.total_rank == 0:
        return x.zero()
    U, S, V = orthogonal_triplets(x, triplets)
    values = torch.cat([s * w for s, w in zip(S, x.weights, strict=True)], dim=-1)
    if values.numel() == 0:
        return x.zero()
    root = values.abs().sqrt()
    return factors_of(V.columns(root).mT, U.columns(root * values.sign()), x.kind)
