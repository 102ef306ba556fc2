"""DARE: drop entries at random, rescale the others, then sum or elect signs."""

from __future__ import annotations

from plait.merging.dense import MergedDelta
from plait.merging.entries.elementwise import Election, in_space, weighted_sum
from plait.merging.entries.random_masks import Drops, kept_at_random
from plait.merging.inputs import MergeInputs
from plait.merging.registry import merge_method
from plait.options import Agreeing, Density, Space


@merge_method("dare_linear", paper="arXiv:2311.03099")
def dare_linear(x: MergeInputs, *, density: Density = 0.5, space: Space = "dense") -> MergedDelta:
    """Keep each entry with probability `density`, divide by it, and add the tasks up: sum_t w_t mask_t D_t / density.

    Args:
        x: The module.
        density: Probability to keep an entry, rounded to a multiple of 2^-16.
        space: Where entries are dropped; see `ties`.

    Cost: one pass over row blocks and 16 random bits per entry.
    Source: Yu et al., ICML 2024, section 3.
    **Deviates**: each task's mask follows (seed, module, content of the adapter), so it depends neither on the order of
    the adapters nor on their names, and differs between adapters. mergekit can rescale by the L1 norm instead.
    """
    drop = kept_at_random(x, density)
    return in_space(x, lambda parts, place: weighted_sum(drop(parts, place), x.weights), space, whole_rows=False)


@merge_method("dare_ties", paper="arXiv:2311.03099")
def dare_ties(
    x: MergeInputs, *, density: Density = 0.5, space: Space = "dense", agreeing: Agreeing = "mean"
) -> MergedDelta:
    """Drop and rescale as DARE does, then elect signs and average those that agree, as TIES does, without its trim.

    Args:
        x: The module.
        density: Probability to keep an entry, rounded to a multiple of 2^-16.
        space: Where entries are dropped; see `ties`.
        agreeing: Whether those that agree are averaged or added up.

    Source: Yu et al., ICML 2024, section 4.2, with Yadav et al. (arXiv:2306.01708) for the merge.
    **Deviates**: masks as in `dare_linear`. The authors' code still trims to the largest fifth after the masks; this is mergekit's form,
    in which the mask takes the place of the trim.
    """
    return in_space(x, Election(x.weights, agreeing, drops=Drops(x, density)), space, whole_rows=False)
