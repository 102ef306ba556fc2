"""KnOTS: align the tasks by one SVD of all their deltas, then TIES on the aligned parts."""

from __future__ import annotations

from typing import Literal

from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import in_space
from plait.merging.inputs import MergeInputs
from plait.merging.methods.ties import thresholds, trimmed
from plait.merging.registry import merge_method
from plait.options import Density


@merge_method("knots", paper="arXiv:2410.19735", ahead=lambda x, o: thresholds(x, o["density"], o["scope"], "knots"))
def knots(x: MergeInputs, *, density: Density = 0.3, scope: Literal["model", "module"] = "model") -> MergedDelta:
    """TIES on the parts S V_t^T of the joint SVD [D_1 .. D_T] = U S [V_1^T .. V_T^T], mapped back by U.

    Args:
        x: The module.
        density: Fraction of each task's aligned entries kept.
        scope: Whether the largest are sought in the whole model (the authors' code) or in each module.

    Returns:
        Exact factors of rank at most R.

    Cost: one SVD of (R, T R) in the lossless core and R x in entries per task.
    Source: Stoica et al., ICLR 2025, section 4.
    **Deviates**: singular values count above 1e-5 of the largest (the authors: above 1e-5, whatever the scale of the
    adapters); weights as in `ties`. Linear merging in this space equals task_arithmetic and is not repeated here.
    """
    return in_space(x, trimmed(thresholds(x, density, scope, "knots"), x.weights), "knots", whole_rows=False)
