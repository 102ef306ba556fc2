"""Random masks that follow (seed, module, place, content of the adapter) and nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.compiled import Loops
from plait.merging.dense import rows_together
from plait.merging.inputs import MergeInputs
from plait.merging.tiles import Spare
from plait.seeds import seed_of

# Keeping is decided by 16 random bits an entry, several times cheaper than a float; the rescaling uses the probability
# that 16 bits express, so the expectation is exact.
LEVELS = 1 << 16
_WORDS = 1 << 10  # numbers of 64 bits that are drawn before they are looked at, in a core's nearest cache


Draws: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]"
# Draws of a block, or what a step makes of all of them at once.
Drawn: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Place:
    """Which entries of a module a rule is given.

    Args:
        space: "dense", or the name of another space, whose draws are made at once.
        shape: (rows, columns) of the whole space; None where all of its entries are given.
        start: Row of the space in which the entries begin.
        left: Column of the space in which they begin.
        drawn: Task -> (first row, draws or a mask) that the last entries came from: the next ones lie beside them.
        spare: Memory that is used again for the next entries; the rule's result may lie there.
    """

    space: str = "dense"
    shape: tuple[int, int] | None = None
    start: int = 0
    left: int = 0
    drawn: dict[int, tuple[int, Drawn]] = field(default_factory=dict)
    spare: Spare = field(default_factory=Spare)

    def blocks(self, rows: int) -> Iterator[tuple[str, int, int]]:
        """Name and range of each block of draws that some of these rows lie in."""
        height, width = self.shape or (rows, 0)
        if self.space != "dense":
            yield self.space, 0, height
            return
        together = rows_together(width)
        for start in range(self.start // together * together, self.start + rows, together):
            yield str(start), start, min(start + together, height)


def draw(x: MergeInputs, task: int, place: Place, shape: tuple[int, ...]) -> Draws:
    """Uniform integers in [0, 65536) for one task's entries at one place; on the CPU whatever the device."""
    if x.members:
        return np.stack([draw(member, task, place, shape[1:]) for member in x.members])
    if place.shape is None:
        return _drawn(x, task, place.space, shape)
    return _of_blocks(place, task, shape, lambda name, rows, width: _drawn(x, task, name, (rows, width)))


def _of_blocks(place: Place, task: int, shape: tuple[int, ...], make: Callable[[str, int, int], Drawn]) -> Drawn:
    """What is made of the blocks that a task's entries at one place lie in; the last block is held."""
    pieces = []
    for name, start, stop in place.blocks(shape[0]):
        if place.drawn.get(task, (-1,))[0] != start:
            place.drawn[task] = start, make(name, stop - start, (place.shape or shape)[1])
        rows = slice(max(0, place.start - start), place.start + shape[0] - start)
        pieces.append(place.drawn[task][1][rows, place.left : place.left + shape[1]])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _drawn(x: MergeInputs, task: int, name: str, shape: tuple[int, ...]) -> Draws:
    count = math.prod(shape)
    words: Draws = _stream(x, task, name).random_raw(-(-count // 4)).view(np.uint16)
    return words[:count].reshape(shape)


def _stream(x: MergeInputs, task: int, name: str) -> np.random.SFC64:
    return np.random.SFC64(seed_of(x.seed, x.module, name, x.contents[task]))


def ones_where(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], like: Tensor) -> Float[Tensor, ...]:
    """A mask as 0.0 and 1.0 of another tensor's dtype and device."""
    return torch.from_numpy(mask.view(np.int8)).to(like.device).to(like.dtype)


class Drops:
    """Keeping each entry of every task's part with probability `density`, rounded to a multiple of 2^-16.

    What is kept is to be multiplied by `scale`.
    """

    def __init__(self, x: MergeInputs, density: float) -> None:
        self.x, self.ranks, self.level = x, x.ranks, max(1, round(density * LEVELS))
        self.scale = LEVELS / self.level if self.level < LEVELS else 1.0

    @property
    def acts(self) -> bool:
        """Whether anything is dropped."""
        return self.level < LEVELS

    def acts_on(self, task: int) -> bool:
        """Whether anything of a task is dropped."""
        return self.acts and self.ranks[task] > 0

    def bits(self, tasks: slice, place: Place, shape: tuple[int, int], loops: Loops) -> Drawn:
        """Give of eight tasks at most which entries are kept: a bit for each, the lowest of the first."""

        def of_block(name: str, rows: int, width: int) -> Drawn:
            streams = [_stream(self.x, task, name) for task in range(tasks.start, tasks.stop)]
            states = np.stack([stream.state["state"]["state"] for stream in streams])
            kept = np.empty(rows * width, np.uint8)
            loops.keep(states, np.uint16(self.level), np.empty(_WORDS, np.uint64), kept)
            return kept.reshape(rows, width)

        return _of_blocks(place, tasks.start, shape, of_block)

    def drop(self, task: int, part: Tensor, place: Place) -> Tensor:
        """Zero the entries of a task's part that are not kept, in place."""
        return part.mul_(_ones_below(self.x, task, place, self.level, part)) if self.acts_on(task) else part


def kept_at_random(x: MergeInputs, density: float) -> Callable[[Iterable[Tensor], Place], Iterator[Tensor]]:
    """A step that keeps each entry with probability `density` and divides it by that, in place."""
    drops = Drops(x, density)

    def step(parts: Iterable[Tensor], place: Place) -> Iterator[Tensor]:
        for task, part in enumerate(parts):
            part = drops.drop(task, part, place)
            yield part.mul_(drops.scale) if drops.acts_on(task) else part

    return step


def _ones_below(x: MergeInputs, task: int, place: Place, level: int, like: Tensor) -> Tensor:
    """1.0 where the draw is below `level`, else 0.0.

    For a GPU blocks are drawn by all cores, into memory that it reads by itself: one core would take longer than all the rest.
    """
    shape = tuple(like.shape)
    if x.members or place.shape is None:
        ones = torch.from_numpy((draw(x, task, place, shape) < level).view(np.int8))
        return ones.to(like.device).to(like.dtype)
    if not like.is_cuda:  # a mask of a whole block, looked at while its draws are in a core's cache
        below = _of_blocks(
            place, task, shape, lambda name, rows, width: (_drawn(x, task, name, (rows, width)) < level).view(np.int8)
        )
        return place.spare.like("ones", like).copy_(torch.from_numpy(below))
    mask = torch.empty(shape, dtype=torch.bool, pin_memory=True)
    rows, _ = mask.numpy(), x.contents

    def fill(block: tuple[str, int, int]) -> None:
        name, start, stop = block
        first, last = max(start, place.start), min(stop, place.start + shape[0])
        words = _drawn(x, task, name, (stop - start, shape[1]))[first - start : last - start]
        np.less(words, level, out=rows[first - place.start : last - place.start])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, place.blocks(shape[0])))
    return mask.to(like.device, non_blocking=True).to(like.dtype)
