"""The k-th largest magnitude per task, exactly, without holding or sorting what it is taken from."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.memory import empty_like, own_copy
from plait.errors import RunError
from plait.merging.compiled import loops_for
from plait.merging.elementwise import groups_of, pairs_of
from plait.merging.inputs import MergeInputs
from plait.merging.tiles import Products, Spare
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
# Standard errors of a sampled quantile on either side of it; a miss (found by counting) widens the bracket.
_WIDTH = 4.0
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
    """Per task, the smallest magnitude among the `density` largest of a product's entries: those that the same tiles give later."""
    if density >= 1:
        return [torch.zeros((), dtype=torch.float32) for _ in products.lefts]
    spare = Spare()

    def values() -> Iterator[tuple[int, Tensor]]:
        for tile in products.tiles(whole_rows=False):
            yield from ((t, part.abs_()) for t, part in enumerate(products.parts(tile, spare)))

    return nth_largest(values, lambda total: math.ceil(density * total), len(products.lefts))


def smallest_kept(part: Tensor, density: float) -> Tensor:
    """The smallest magnitude among the `density` largest of a matrix's entries, as a scalar; 0 where all are kept.

    Of a stack of matrices, one for each.
    """
    if density >= 1 or not part.numel():
        return torch.zeros(part.shape[:-2], dtype=part.dtype)
    return _kth(part.abs().flatten(-2), math.ceil(density * (part.shape[-2] * part.shape[-1])))


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
            found[g] = _kth(torch.cat(held[g]), rank(totals[g]))
    brackets = {g: _Bracket(samples[g], n, rank(n)) for g, n in enumerate(totals) if n > _SMALL}
    while brackets:
        values(_Counting(brackets, len(totals)).take)
        found = [brackets[g].exact() if g in brackets and brackets[g].hit() else v for g, v in enumerate(found)]
        brackets = {g: b.wider() for g, b in brackets.items() if not b.hit()}
    return found


def _counted(values: Blocks, groups: int) -> tuple[list[int], list[Float[Tensor, " n"]]]:
    totals, parts = [0] * groups, [[torch.zeros(0, dtype=torch.float32)] for _ in range(groups)]
    for g, block in values():
        totals[g] += block.numel()
        parts[g].append(block.flatten()[::_STRIDE].clone().cpu())
    return totals, [torch.cat([p.to(part[-1].dtype) for p in part]) for part in parts]


class _Bracket:
    """Bounds that should hold the k-th largest of `total` values, and what a pass over them finds."""

    def __init__(self, sample: Float[Tensor, " n"], total: int, k: int, widening: float = 1.0) -> None:
        self.sample, self.total, self.k, self.widening = sample, total, k, widening
        ordered, share = torch.from_numpy(np.sort(sample.numpy())), k / total
        spread = widening * (_WIDTH * math.sqrt(share * (1 - share) / len(ordered)) + 2 / len(ordered))
        self.low, self.high = _at_share(ordered, share + spread), _at_share(ordered, share - spread)
        self.above = self.held = 0
        self.inside = empty_like(sample, (min(total, 1024 + int(1.5 * spread * total)),))

    def hold(self, above: int, part: Tensor) -> None:
        """Count values above, and keep those inside in one buffer: a list of small arrays splits the heap for good."""
        self.above += above
        wanted = self.held + part.numel()
        if wanted > self.inside.numel() or self.inside.device != part.device:
            larger = empty_like(part, (max(wanted, 2 * self.held, self.inside.numel()),))
            larger[: self.held] = self.inside[: self.held]
            self.inside = larger
        here = self.inside[self.held : wanted]
        here.copy_(part) if part.is_cuda else np.copyto(
            here.numpy(), part.numpy()
        )  # torch takes ten times as long for few
        self.held = wanted

    def hit(self) -> bool:
        """Whether the k-th largest is inside."""
        return self.above < self.k <= self.above + self.held

    def exact(self) -> Tensor:
        """The k-th largest, once hit."""
        return _kth(self.inside[: self.held], self.k - self.above)

    def wider(self) -> _Bracket:
        """Another try; a bracket of everything misses only where values are not finite."""
        if self.low == 0 and self.high == math.inf:
            raise RunError("the deltas hold NaN or infinity: products of their factors overflow float32")
        return _Bracket(self.sample, self.total, self.k, 4 * self.widening)


class _Counting:
    """One pass over the values of all groups that still have a bracket; blocks come from several threads."""

    def __init__(self, brackets: Mapping[int, _Bracket], groups: int) -> None:
        self.brackets, self.lock = brackets, threading.Lock()
        self.loops = loops_for(sum(b.total for b in brackets.values()))
        # Groups without one have an empty bracket beyond everything.
        self.low = np.array([brackets[g].low if g in brackets else math.inf for g in range(groups)])
        self.high = np.array([brackets[g].high if g in brackets else math.inf for g in range(groups)])

    def take(self, first: int, blocks: Float[Tensor, "k ..."], spare: Spare) -> None:
        """Count what lies above each bracket, and hand it what lies inside."""
        if blocks.is_cuda:
            for g, block in enumerate(blocks, first):
                if b := self.brackets.get(g):
                    block = block.abs()
                    with self.lock:
                        b.hold(int(torch.count_nonzero(block > b.high)), block[(block >= b.low) & (block <= b.high)])
            return
        array = blocks.numpy().reshape(len(blocks), -1)
        if self.loops and array.dtype == np.float32:
            inside = spare.tensor("inside", array.shape[1:], blocks.dtype, blocks.device)
            for g, values in enumerate(array, first):
                if b := self.brackets.get(g):
                    above, held = self.loops.count(values, np.float32(b.low), np.float32(b.high), inside.numpy())
                    with self.lock:
                        b.hold(above, inside[:held])
            return
        higher, within = (spare.tensor(n, array.shape, torch.bool, blocks.device).numpy() for n in ("higher", "within"))
        low, high = (bounds[first : first + len(blocks), None].astype(array.dtype) for bounds in (self.low, self.high))
        # NumPy's boolean kernels are several times faster than torch's. Infinity lies inside a bracket without an upper end.
        np.abs(array, out=array)
        np.greater(array, high, out=higher)
        np.not_equal(np.greater_equal(array, low, out=within), higher, out=within)
        parts = [
            (int(np.count_nonzero(h)), torch.from_numpy(v[w])) for v, h, w in zip(array, higher, within, strict=True)
        ]
        with self.lock:
            for g, (above, part) in enumerate(parts, first):
                if b := self.brackets.get(g):
                    b.hold(above, part)


def _kth(values: Float[Tensor, "... n"], k: int) -> Tensor:
    """NumPy's selection takes a seventh of torch's time on a CPU; NaN counts as largest with either."""
    n = values.shape[-1] - k
    if values.is_cuda:
        return values.kthvalue(n + 1).values.cpu()
    return torch.from_numpy(np.partition(values.numpy(), n)[..., n : n + 1])[..., 0]


def _at_share(ordered: Float[Tensor, " n"], share: float) -> float:
    """Value with this share of an ascending sample at or above it: 0 beyond one end, infinity beyond the other."""
    if share >= 1:
        return 0.0
    return math.inf if share <= 0 else float(ordered[min(len(ordered) - 1, int((1 - share) * len(ordered)))])


def _samples(modules: Sequence[MergeInputs], totals: Sequence[int], space: str) -> list[Float[Tensor, " n"]]:
    """Magnitudes of random entries of each task's parts, from each module in proportion to its size."""

    def of(place: int) -> list[Tensor]:
        x = modules[place]
        lefts, rights = pairs_of(x, space) if x.total_rank else ((), ())
        ranks, found = x.ranks, []
        for task, (rank, total) in enumerate(zip(ranks, totals, strict=True)):
            part = torch.zeros(0, dtype=torch.float32)
            if rank and total > _SMALL:
                rows, columns = lefts[task].shape[0], rights[task].shape[1]
                n = _wanted(total) * rows * columns // total
                generator = torch.Generator().manual_seed(seed_of(x.module, "quantile"))
                i = torch.randint(rows, (n,), generator=generator).to(x.device)
                j = torch.randint(columns, (n,), generator=generator).to(x.device)
                columns_of = rights[task].T.contiguous()  # one of them lies in one place
                part = (lefts[task][i] * columns_of[j]).sum(1).abs().cpu()
            found.append(part)
        return found

    found = side_by_side(of, range(len(modules)), modules[0].device)
    return [own_copy(torch.cat([p for p in parts if p.numel()] or parts[:1])) for parts in zip(*found, strict=True)]


def _wanted(total: int) -> int:
    """How many of so many entries are looked at."""
    return 1 << (14 if total < 1 << 21 else 16 if total < 1 << 24 else 18)
