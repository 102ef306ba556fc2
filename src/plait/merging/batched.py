"""Modules of equal shapes and ranks, computed by one call of a method: what that costs is then paid once for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import torch

from plait.merging.inputs import MergeInputs

# Most modules of a stack: what a small operation of torch costs beside its arithmetic is paid once for all of them.
MOST_MODULES = 4
# Most numbers of all tasks' factors in a stack, 4 MB of float32: larger modules have arithmetic enough of their own.
MOST_NUMBERS = 1 << 20


def stack_of(members: Sequence[MergeInputs]) -> MergeInputs:
    """Join modules of equal shapes, ranks and kinds into one: every factor has a dimension for them in front."""
    first, n = members[0], len(members)
    (out, width), ranks = first.shape, list(first.ranks)
    A = torch.cat([a for x in members for a in x.A]).view(n, -1, width)
    B = torch.cat([b for x in members for b in x.B], dim=1).view(out, n, -1).transpose(0, 1)
    return replace(
        first,
        module=", ".join(x.module for x in members),
        A=torch.split(A, ranks, dim=-2),
        B=torch.split(B, ranks, dim=-1),
        members=tuple(members),
        joined=(A, B),
    )


def grouped(modules: Iterable[tuple[str, Hashable, int]]) -> list[list[str]]:
    """List modules that have one key, up to `most` together, in the order in which the lists begin.

    Args:
        modules: (name, key, most) each.
    """
    groups: list[list[str]] = []
    open_ones: dict[Hashable, list[str]] = {}
    for name, key, most in modules:
        if key not in open_ones or len(open_ones[key]) >= most:
            groups.append([])
            open_ones[key] = groups[-1]
        open_ones[key].append(name)
    return groups


def most_together(shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Say how many modules of one shape, and of these ranks task by task, one stack may hold."""
    total = sum(ranks)
    if not 0 < total < min(shape):  # from there on modules have arithmetic enough of their own
        return 1
    return min(MOST_MODULES, max(1, MOST_NUMBERS // (total * sum(shape))))
