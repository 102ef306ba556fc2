"""The k-th largest magnitude of each task's delta, exactly, without holding or sorting the deltas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from plait.merging.elementwise import entry_count, parts_of
from plait.merging.inputs import MergeInputs, seed_of

# Entries up to which they are simply sorted out in memory: 4 MB.
_SMALL = 1 << 20
# Standard errors of a sampled quantile on either side of it; a miss (found by counting) widens the bracket.
_WIDTH = 5.0


def magnitude_thresholds(modules: Sequence[MergeInputs], density: float, space: str = "dense") -> list[Tensor]:
    """Per task, the smallest magnitude among the `density` largest of its entries in these modules.

    A sample brackets the quantile, one pass over the row blocks counts what lies above the bracket and keeps what lies
    inside, and the k-th largest is then exact. Modules a task does not adapt hold none of its entries.

    Args:
        modules: Whose entries are compared with each other.
        density: Fraction kept, in (0, 1].
        space: See `elementwise.in_space`.

    Returns:
        One scalar tensor per task; 0 for a task without entries or with density 1.

    Cost:
        One pass over the deltas; memory for about one entry in a hundred.
    """
    return [_threshold(modules, t, density, space) for t in range(len(modules[0].tasks))] if modules else []


def _threshold(modules: Sequence[MergeInputs], task: int, density: float, space: str) -> Tensor:
    counts = [entry_count(x, task, space) for x in modules]
    total = sum(counts)
    k = math.ceil(density * total)
    if k >= total:
        return torch.zeros(())
    if total <= _SMALL or space != "dense":
        return _kth_largest(torch.cat([p.abs_().flatten() for p in _all_parts(modules, task, space)]), k)
    sample = _sampled(modules, counts, task)
    spread = _WIDTH * math.sqrt(density * (1 - density) / sample.numel()) + 2 / sample.numel()
    while True:
        low, high = _order_statistics(sample, density + spread), _order_statistics(sample, density - spread)
        above, inside = _count(modules, task, space, low, high)
        if above < k <= above + inside.numel():
            return _kth_largest(inside, k - above)
        spread *= 4


def _all_parts(modules: Sequence[MergeInputs], task: int, space: str) -> Iterator[Tensor]:
    for x in modules:
        yield from parts_of(x, task, space)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(values.numel() - k + 1).values.cpu()


def _order_statistics(ordered: Tensor, fraction: float) -> float:
    """Value with `fraction` of an ascending sample at or above it: 0 beyond one end, infinity beyond the other."""
    if fraction >= 1:
        return 0.0
    return (
        math.inf if fraction <= 0 else float(ordered[min(ordered.numel() - 1, int((1 - fraction) * ordered.numel()))])
    )


def _sampled(modules: Sequence[MergeInputs], counts: Sequence[int], task: int) -> Tensor:
    """Magnitudes of random entries, ascending, drawn from each module in proportion to its size."""
    total = sum(counts)
    wanted = 1 << 16 if total < 1 << 23 else 1 << 18 if total < 1 << 28 else 1 << 21
    found = []
    for x, count in zip(modules, counts, strict=True):
        if count:
            generator = torch.Generator().manual_seed(seed_of(x.module, "quantile"))
            n = max(1, wanted * count // total)
            i = torch.randint(x.shape[0], (n,), generator=generator).to(x.device)
            j = torch.randint(x.shape[1], (n,), generator=generator).to(x.device)
            found.append((x.B[task][i] * x.A[task].T[j]).sum(1).abs())
    return torch.cat(found).sort().values


def _count(modules: Sequence[MergeInputs], task: int, space: str, low: float, high: float) -> tuple[int, Tensor]:
    above, inside = 0, []
    for part in _all_parts(modules, task, space):
        part.abs_()
        top = part > high
        above += int(torch.count_nonzero(top))
        inside.append(part[(part >= low).logical_xor_(top)])
    return above, torch.cat(inside)
