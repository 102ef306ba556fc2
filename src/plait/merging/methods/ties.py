"""TIES: trim, elect a sign, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import Election, in_space
from plait.merging.entries.quantile import magnitude_thresholds
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Agreeing, Density, Space


@merge_method("ties", paper="arXiv:2306.01708", ahead=lambda x, o: thresholds(x, o["density"], o["scope"], o["space"]))
def ties(
    x: MergeInputs,
    *,
    density: Density = 0.2,
    scope: Literal["model", "module"] = "model",
    space: Space = "dense",
    agreeing: Agreeing = "mean",
) -> MergedDelta:
    """Keep each task's largest entries, elect the sign of their weighted sum, average the entries that agree.

    Args:
        x: The module.
        density: Fraction of entries kept, by magnitude.
        scope: Whether the largest are sought in the whole model (the paper) or in each module (mergekit).
        space: Where entries are compared: the dense deltas, the lossless core in its SVD basis, or KnOTS' S V^T.
        agreeing: Whether those that agree are averaged (the paper) or added up.

    Cost: scope model reads every delta twice, in row blocks.
    Source: Yadav et al., NeurIPS 2023, algorithm 1.
    **Deviates**: weights multiply the entries before the election, and the mean divides by the sum of |w_t| of those
    that agree (the paper has no weights; with equal ones this is its plain mean). An entry whose sum is exactly zero
    counts as positive; the authors give it the sign most common in the model. The kept number is rounded up (theirs is
    one more than rounded down). mergekit trims per module; PEFT trims A and B instead of the delta.
    """
    return in_space(x, trimmed(thresholds(x, density, scope, space), x.weights, agreeing), space, whole_rows=False)


def thresholds(x: MergeInputs, density: float, scope: str, space: str) -> list[Tensor]:
    """Find the magnitude from which a task's entries are kept: one for the whole model, or one for this module."""
    if scope == "model":
        return x.over_model(magnitude_thresholds, density, space)
    return magnitude_thresholds([x], density, space)


def trimmed(thresholds: Sequence[Tensor], weights: Sequence[float], agreeing: str = "mean") -> Election:
    """The rule: entries below their task's threshold are zero; then the mean of those that agree with the elected sign.

    A threshold is a scalar, or for parts of a stack of modules one for each of them.
    """
    bounds = [threshold if threshold.ndim else float(threshold) for threshold in thresholds]
    return Election(weights, agreeing, bounds)
