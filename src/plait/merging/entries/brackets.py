"""Bounds that should hold the k-th largest of many values, and one pass that counts what lies above and keeps what lies inside."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.adapters.memory import empty_like
from plait.errors import RunError
from plait.merging.entries.compiled import loops_for
from plait.merging.entries.tiles import Spare

_Values = np.ndarray[tuple[int], np.dtype[np.floating[Any]]]

# Standard errors of a sampled quantile on either side of it; a miss (found by counting) widens the bracket.
_WIDTH = 4.0


class Bracket:
    """Bounds that should hold the k-th largest of `total` values, and what a pass over them finds."""

    def __init__(self, sample: Float[Tensor, " n"], total: int, k: int, widening: float = 1.0) -> None:
        self.sample, self.total, self.k, self.widening = sample, total, k, widening
        ordered, share = torch.from_numpy(np.sort(sample.numpy())), k / total
        spread = widening * (_WIDTH * math.sqrt(share * (1 - share) / len(ordered)) + 2 / len(ordered))
        self.low, self.high = _at_share(ordered, share + spread), _at_share(ordered, share - spread)
        self.above = self.held = 0
        self.inside = empty_like(sample, (min(total, 1024 + int(1.5 * spread * total)),)).numpy()

    def hold(self, above: int, part: _Values) -> None:
        """Count values above, and keep those inside in one buffer: a list of small arrays splits the heap for good."""
        self.above += above
        wanted = self.held + len(part)
        if wanted > len(self.inside):
            larger = empty_like(self.sample, (max(wanted, 2 * self.held),)).numpy()
            larger[: self.held] = self.inside[: self.held]
            self.inside = larger
        self.inside[self.held : wanted] = part
        self.held = wanted

    def hit(self) -> bool:
        """Whether the k-th largest is inside."""
        return self.above < self.k <= self.above + self.held

    def exact(self) -> Tensor:
        """The k-th largest, once hit."""
        return kth_largest(torch.from_numpy(self.inside[: self.held]), self.k - self.above)

    def wider(self) -> Bracket:
        """Another try; a bracket of everything misses only where values are not finite."""
        if self.low == 0 and self.high == math.inf:
            raise RunError("the deltas hold NaN or infinity: products of their factors overflow float32")
        return Bracket(self.sample, self.total, self.k, 4 * self.widening)


class Counting:
    """One pass over the values of all groups that still have a bracket; blocks come from several threads."""

    def __init__(self, brackets: Mapping[int, Bracket], groups: int) -> None:
        self.brackets, self.lock = brackets, threading.Lock()
        self.total = sum(b.total for b in brackets.values())
        self.waiting: dict[tuple[int, int], _Waiting] = {}  # by thread and first group
        # Groups without one have an empty bracket beyond everything.
        self.low = np.array([brackets[g].low if g in brackets else math.inf for g in range(groups)])
        self.high = np.array([brackets[g].high if g in brackets else math.inf for g in range(groups)])

    def take(self, first: int, blocks: Float[Tensor, "k ..."], spare: Spare) -> None:
        """Count what lies above each bracket, and hand it what lies inside: now, or when `rest` is called."""
        if blocks.is_cuda:
            for g, block in enumerate(blocks, first):
                if b := self.brackets.get(g):
                    block = block.abs()
                    inside = block[(block >= b.low) & (block <= b.high)].cpu().numpy()
                    with self.lock:
                        b.hold(int(torch.count_nonzero(block > b.high)), inside)
            return
        loops = loops_for(self.total)
        array = blocks.numpy().reshape(len(blocks), -1)
        low, high = (bounds[first : first + len(blocks)].astype(array.dtype) for bounds in (self.low, self.high))
        if loops and array.dtype == np.float32:
            key = threading.get_ident(), first
            waiting = self.waiting.get(key)
            if waiting is None or waiting.inside.shape[1] < 2 * array.shape[1]:
                self._hold(first, waiting)
                waiting = self.waiting[key] = _Waiting.of(len(array), array.shape[1])
            loops.count(array, low, high, waiting.inside, waiting.above, waiting.held)
            if int(waiting.held.max()) + array.shape[1] > waiting.inside.shape[1]:
                self._hold(first, waiting)
            return
        higher, within = (spare.tensor(n, array.shape, torch.bool, blocks.device).numpy() for n in ("higher", "within"))
        # NumPy's boolean kernels are several times faster than torch's. Infinity lies inside a bracket without an upper end.
        np.abs(array, out=array)
        np.greater(array, high[:, None], out=higher)
        np.not_equal(np.greater_equal(array, low[:, None], out=within), higher, out=within)
        parts = [(int(np.count_nonzero(h)), v[w]) for v, h, w in zip(array, higher, within, strict=True)]
        self._add(first, parts)

    def rest(self) -> None:
        """Hand over what the threads that have ended left."""
        for (_, first), waiting in self.waiting.items():
            self._hold(first, waiting)
        self.waiting.clear()

    def _hold(self, first: int, waiting: _Waiting | None) -> None:
        if waiting is not None:
            lists = waiting.above.tolist(), waiting.inside, waiting.held.tolist()
            self._add(first, [(over, row[:n]) for over, row, n in zip(*lists, strict=True)])
            waiting.above[:] = waiting.held[:] = 0

    def _add(self, first: int, parts: Sequence[tuple[int, _Values]]) -> None:
        with self.lock:
            for g, (over, part) in enumerate(parts, first):
                if b := self.brackets.get(g):
                    b.hold(over, part)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What one thread found in several blocks, to be handed over together.

    Args:
        inside: (k, N), which have a place for those of one block more.
        above, held: (k,): how many were above, and are inside.
    """

    inside: Any
    above: Any
    held: Any

    @classmethod
    def of(cls, groups: int, size: int) -> _Waiting:
        return cls(np.empty((groups, 2 * size), np.float32), np.zeros(groups, np.int64), np.zeros(groups, np.int64))


def kth_largest(values: Float[Tensor, "... n"], k: int) -> Tensor:
    """The k-th largest of magnitudes along the last dimension; on a CPU the values are put into another order.

    NumPy's selection takes a seventh of torch's time there, and of integers, whose bits order magnitudes in the same way, a third
    of that; NaN counts as largest with either.
    """
    n = values.shape[-1] - k
    if values.is_cuda:
        return values.kthvalue(n + 1).values.cpu()
    array = values.numpy()
    array.view(np.dtype(f"i{array.itemsize}")).partition(n, axis=-1)
    return torch.from_numpy(array[..., n].copy())


def _at_share(ordered: Float[Tensor, " n"], share: float) -> float:
    """Value with this share of an ascending sample at or above it: 0 beyond one end, infinity beyond the other."""
    if share >= 1:
        return 0.0
    return math.inf if share <= 0 else float(ordered[min(len(ordered) - 1, int((1 - share) * len(ordered)))])
