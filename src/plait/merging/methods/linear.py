"""Methods whose merged delta is a weighted sum of the deltas: exact, by concatenating factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from plait.adapters.lora import LoraFactors, truncated
from plait.errors import UsageError
from plait.merging.combinations import as_given as as_given
from plait.merging.combinations import normalised as normalised
from plait.merging.dense import Truncated
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Range


def importances(weights: Sequence[float]) -> Sequence[float]:
    """The weights, where they say how much a task matters to an objective.

    Raises:
        UsageError: One is negative, or all are zero.
    """
    if any(w < 0 for w in weights) or not any(weights):
        raise UsageError(
            f"weights {list(weights)}: this method weighs tasks, so none may be negative and one must be positive"
        )
    return weights


@merge_method("linear", combination=normalised, concatenates=True)
def linear(x: MergeInputs) -> LoraFactors:
    """The weighted mean of the deltas, sum_t w_t D_t / sum_t w_t, exactly.

    Cost: copying the factors; rank R = sum of ranks.
    **Deviates** from PEFT's `linear`, which adds A's and B's separately and so gets cross terms B_t A_u.
    """
    return x.combination(normalised(x.weights))


@merge_method("task_arithmetic", paper="arXiv:2212.04089", combination=as_given, concatenates=True)
def task_arithmetic(x: MergeInputs) -> LoraFactors:
    """The weighted sum of the deltas, sum_t w_t D_t, exactly; negative weights are legal.

    Cost: copying the factors; rank R = sum of ranks.
    Source: Ilharco et al., ICLR 2023, section 2 (their scaling coefficient is `scale`).
    """
    return x.combination(x.weights)


@merge_method("cat", combination=as_given, concatenates=True)
def cat(x: MergeInputs) -> LoraFactors:
    """The weighted sum as concatenated factors: what PEFT calls `cat`, equal to task_arithmetic here.

    **Deviates** from PEFT's `cat` only where its factors disagree with themselves: each adapter keeps its own scaling
    and rank here, patterns included.
    """
    return x.combination(x.weights)


@merge_method("svd", combination=as_given, cuts_by="svd_rank")
def svd(x: MergeInputs, *, svd_rank: Annotated[int, Range(1)] | None = None) -> Truncated:
    """The best approximation of the weighted sum at one adapter's rank, by an SVD in the lossless core.

    Args:
        x: The module.
        svd_rank: Rank kept; by default the merge's rank, where one is asked for, else the largest among the inputs, as PEFT has it.

    Cost: QR of both concatenated factors and an SVD of (R, R).
    **Deviates** from PEFT's `svd` in never forming the (out, in) sum; the result is the same to rounding.
    """
    return Truncated(*truncated(x.combination(x.weights), svd_rank or max(1, *x.ranks)))
