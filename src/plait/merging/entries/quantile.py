"""The k-th largest magnitude per task, exactly, without holding or sorting what it is taken from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.memory import own_copy
from plait.merging.entries.brackets import Bracket, Counting, kth_largest
from plait.merging.entries.elementwise import groups_of, pairs_of
from plait.merging.entries.tiles import TOGETHER, Products, Spare
from plait.merging.inputs import MergeInputs
from plait.merging.workers import side_by_side
from plait.seeds import seed_of

# Makes one pass over nonnegative values, in blocks, each with the index of the group (the task) it belongs to.
Blocks = Callable[[], Iterator[tuple[int, Tensor]]]
# Takes in blocks of one group and of those that follow it, side by side, with memory of its thread's.
Take = Callable[[int, Float[Tensor, "k ..."], Spare], None]
# Hands all such blocks to a function; from several threads at once where that is faster.
Pass = Callable[[Take], None]

# Values up to which a group is simply selected from in memory; beyond it a bracket is faster.
_SMALL = 1 << 16
# Most entries of the parts that are held whole to be selected from, 128 MB of float32.
WHOLE = 1 << 25
# One value in this many is looked at where nothing better is known about how to sample; prime, so as not to follow columns.
_STRIDE = 61


def magnitude_thresholds(modules: Sequence[MergeInputs], density: float, space: str = "dense") -> list[Tensor]:
    """Per task, the smallest magnitude among the `density` largest of its entries in these modules.

    Args:
        modules: Whose entries are compared with each other; those a task does not adapt hold none of its entries.
        density: Fraction kept, in (0, 1].
        space: See `elementwise.in_space`.

    Returns:
        One scalar tensor per task; 0 for a task without entries or with density 1.

    Cost:
        One pass over the deltas; memory for about one entry in a hundred.
    """
    if density >= 1:
        return [torch.zeros((), dtype=torch.float32) for _ in modules[0].tasks]
    return magnitudes_at(modules, lambda total: math.ceil(density * total), space)


def thresholds_of(products: Products, density: float) -> list[Tensor]:
    """Per task, the smallest magnitude among the `density` largest of a product's entries: those that the same tiles give later.

    Parts that fit in memory are selected from whole, as many as are made together: a sample, and a pass to count, take longer.
    """
    if density >= 1:
        return [torch.zeros((), dtype=torch.float32) for _ in products.lefts]
    (n, m), spare = products.shape, Spare()
    if min(len(products.lefts), TOGETHER) * n * m > WHOLE:

        def values() -> Iterator[tuple[int, Tensor]]:
            for tile in products.tiles(whole_rows=False):
                yield from ((t, part.abs_()) for t, part in enumerate(products.parts(tile, spare)))

        return nth_largest(values, lambda total: math.ceil(density * total), len(products.lefts))
    bounds: list[Tensor] = []
    for few in products.few():
        whole = spare.tensor("whole", (len(few.lefts), n, m), few.lefts[0].dtype, products.device)
        for tile in few.tiles(whole_rows=False):
            for first, group in few.groups(tile, spare):
                place = slice(first, first + len(group)), slice(tile.top, tile.bottom), slice(tile.left, tile.right)
                torch.abs(group, out=whole[place])
        bounds += kth_largest(whole.flatten(1), math.ceil(density * (n * m))).unbind()
    return bounds


def smallest_kept(part: Tensor, density: float) -> Tensor:
    """The smallest magnitude among the `density` largest of a matrix's entries, as a scalar; 0 where all are kept.

    Of a stack of matrices, one for each.
    """
    if density >= 1 or not part.numel():
        return torch.zeros(part.shape[:-2], dtype=part.dtype)
    return kth_largest(part.abs().flatten(-2), math.ceil(density * (part.shape[-2] * part.shape[-1])))


def magnitudes_at(modules: Sequence[MergeInputs], rank: Callable[[int], int], space: str = "dense") -> list[Tensor]:
    """Per task, the k-th largest magnitude, k = rank(number of its entries); 0 where there are none.

    Modules are looked at side by side: the answer is exact, so it does not depend on their order.
    """

    def values(take: Take) -> None:
        def one(place: int) -> None:
            spare = Spare()
            for first, parts in groups_of(modules[place], spare, space):
                take(first, parts, spare)

        side_by_side(one, range(len(modules)), modules[0].device)

    sizes = side_by_side(lambda place: _sizes_in(modules[place], space), range(len(modules)), modules[0].device)
    totals = list(map(sum, zip(*sizes, strict=True)))
    return _nth_largest(values, rank, totals, _samples(modules, totals, space))


def _sizes_in(x: MergeInputs, space: str) -> list[int]:
    """Entries of each task's part of a module in a space."""
    rows, columns = x.shape
    if space == "core":
        rows, columns = min(rows, x.total_rank), min(columns, x.total_rank)
    elif space == "knots" and x.total_rank:
        rows = x.aligned.left.shape[1]
    return [rows * columns if rank else 0 for rank in x.ranks]


def nth_largest(values: Blocks, rank: Callable[[int], int], groups: int) -> list[Tensor]:
    """Per group, the k-th largest of many nonnegative values, k = rank(their number).

    A sample brackets it, one pass counts what lies above the bracket and keeps what lies inside, and the k-th is exact.

    Args:
        values: Makes one pass over them; one more finds out how many there are.
        rank: From the number of a group's values to k, from 1 to that number.
        groups: How many groups there are.
    """

    def passed(take: Take) -> None:
        spare = Spare()
        for g, block in values():
            take(g, block[None], spare)

    return _nth_largest(passed, rank, *_counted(values, groups))


def _nth_largest(
    values: Pass, rank: Callable[[int], int], totals: Sequence[int], samples: Sequence[Float[Tensor, " n"]]
) -> list[Tensor]:
    """`nth_largest` where it is known how many values each group has, and some of them drawn at random."""
    found = [torch.zeros((), dtype=torch.float32) for _ in totals]
    if small := [g for g, total in enumerate(totals) if 0 < total <= _SMALL]:
        held: dict[int, list[Tensor]] = {g: [] for g in small}

        def hold(first: int, blocks: Tensor, _: Spare) -> None:
            for g, block in enumerate(blocks, first):
                if g in held:
                    held[g].append(block.abs().flatten())

        values(hold)
        for g in small:
            found[g] = kth_largest(torch.cat(held[g]), rank(totals[g]))
    brackets = {g: Bracket(samples[g], n, rank(n)) for g, n in enumerate(totals) if n > _SMALL}
    while brackets:
        counting = Counting(brackets, len(totals))
        values(counting.take)
        counting.rest()
        found = [brackets[g].exact() if g in brackets and brackets[g].hit() else v for g, v in enumerate(found)]
        brackets = {g: b.wider() for g, b in brackets.items() if not b.hit()}
    return found


def _counted(values: Blocks, groups: int) -> tuple[list[int], list[Float[Tensor, " n"]]]:
    totals, parts = [0] * groups, [[torch.zeros(0, dtype=torch.float32)] for _ in range(groups)]
    for g, block in values():
        totals[g] += block.numel()
        parts[g].append(block.flatten()[::_STRIDE].clone().cpu())
    return totals, [torch.cat([p.to(part[-1].dtype) for p in part]) for part in parts]


def _samples(modules: Sequence[MergeInputs], totals: Sequence[int], space: str) -> list[Float[Tensor, " n"]]:
    """Magnitudes of random entries of each task's parts, from each module in proportion to its size."""

    def of(place: int) -> list[Tensor]:
        x = modules[place]
        lefts, rights = pairs_of(x, space) if x.total_rank else ((), ())
        ranks, found = x.ranks, []
        places: dict[int, tuple[Tensor, Tensor]] = {}  # by their number: those of one task are as good for the others
        for task, (rank, total) in enumerate(zip(ranks, totals, strict=True)):
            part = torch.zeros(0, dtype=torch.float32)
            if rank and total > _SMALL:
                rows, columns = lefts[task].shape[0], rights[task].shape[1]
                n = _wanted(total) * rows * columns // total
                if n not in places:
                    generator = torch.Generator().manual_seed(seed_of(x.module, "quantile"))
                    i, j = (torch.randint(size, (n,), generator=generator).to(x.device) for size in (rows, columns))
                    places[n] = i, j
                i, j = places[n]
                # Entries of long rows, added up row by row: a third of the time of rows of a few entries each.
                part = (lefts[task].T.index_select(1, i) * rights[task].index_select(1, j)).sum(0).abs_().cpu()
            found.append(part)
        return found

    found = side_by_side(of, range(len(modules)), modules[0].device)
    return [own_copy(torch.cat([p for p in parts if p.numel()] or parts[:1])) for parts in zip(*found, strict=True)]


def _wanted(total: int) -> int:
    """How many of so many entries are looked at."""
    return 1 << (14 if total < 1 << 21 else 16 if total < 1 << 24 else 18)
