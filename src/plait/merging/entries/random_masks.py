"""Random masks that follow (seed, module, place, content of the adapter) and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.dense import rows_together
from plait.merging.entries.compiled import Loops, loops_for
from plait.merging.entries.streams import states_of
from plait.merging.entries.tiles import TOGETHER, Spare
from plait.merging.inputs import MergeInputs
from plait.merging.light.threads import cores, in_threads
from plait.seeds import seed_of

# Keeping is decided by 16 random bits an entry, several times cheaper than a float; the rescaling uses the probability
# that 16 bits express, so the expectation is exact.
LEVELS = 1 << 16
_WORDS = 1 << 10  # numbers of 64 bits that are drawn before they are looked at, in a core's nearest cache
_PIECE = (
    1 << 13
)  # as many as NumPy draws at once without asking the system for new memory, whose pages cost more than the draws
_MOST = 64  # threads that draw for a GPU

Draws: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]"
# Of eight tasks' entries, by the bits of a byte, which are kept.
Bits: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"
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
    """Uniform integers in [0, 65536) for one task's entries at one place."""
    if x.members:
        return np.stack([draw(member, task, place, shape[1:]) for member in x.members])
    if place.shape is None:
        return _drawn(x, task, place.space, shape)
    return _of_blocks(place, task, shape, lambda name, rows, width: _drawn(x, task, name, (rows, width)))


def draw_for(x: MergeInputs, task: int, place: Place, part: Tensor) -> Tensor:
    """What `draw` gives for a part on a GPU, there, int32."""
    if x.members or place.shape is None:
        words = torch.from_numpy(draw(x, task, place, tuple(part.shape)).view(np.int16)).to(part.device)
    else:
        there = _for_gpu(part, torch.int16)
        fill_draws(x, task, place, there.numpy().view(np.uint16), cores(_MOST))
        words = there.to(part.device, non_blocking=True)
    return words.to(torch.int32).bitwise_and_(LEVELS - 1)


def fill_draws(x: MergeInputs, task: int, place: Place, out: Draws, threads: int) -> None:
    """Write what `draw` gives of whole rows, as `fill_rows` does."""

    def make(name: str, block: Drawn) -> None:
        for start, words in _pieces(x, task, name, len(block)):
            block[start : start + len(words)] = words

    _ = x.contents  # once, before threads ask for it
    fill_rows(place, out, make, threads)


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


def _pieces(x: MergeInputs, task: int, name: str, count: int) -> Iterator[tuple[int, Draws]]:
    """The draws of one block as far as they fit a core's cache, and where they begin."""
    stream = _stream(x, task, name)
    for start in range(0, count, 4 * _PIECE):
        words: Draws = stream.random_raw(min(_PIECE, -(-(count - start) // 4))).view(np.uint16)
        yield start, words[: count - start]


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
        self._states: dict[str, np.ndarray[tuple[int, int], np.dtype[np.uint64]]] = {}
        self._sent: tuple[tuple[int, int], Tensor] | None = None

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
            kept = np.empty(rows * width, np.uint8)
            self._draw(tasks, place, name, kept, loops)
            return kept.reshape(rows, width)

        return _of_blocks(place, tasks.start, shape, of_block)

    def fill(self, tasks: slice, place: Place, out: Bits, threads: int) -> None:
        """Write what `bits` gives of whole rows, as `fill_rows` does.

        Args:
            tasks: Eight at most.
            place: Where the rows begin.
            out: (rows, all columns).
            threads: How many; the bits are the same whatever their number.
        """
        loops = loops_for(math.prod(place.shape or out.shape) * len(self.ranks) * self.x.modules)
        self._begin(place)
        fill_rows(place, out, lambda name, block: self._draw(tasks, place, name, block, loops), threads)

    def _draw(self, tasks: slice, place: Place, name: str, out: Bits, loops: Loops | None) -> None:
        """The bits of one block, in `out`, (n,)."""
        if loops:
            states = self._begin(place)[name][tasks].copy()  # which move on
            loops.keep(states, np.uint16(self.level), np.empty(_WORDS, np.uint64), out)
            return
        out[:] = 0
        bit_set = np.empty(min(len(out), 4 * _PIECE), np.uint8)
        for bit, task in enumerate(range(tasks.start, tasks.stop)):
            for start, words in _pieces(self.x, task, name, len(out)):
                part, here = out[start : start + len(words)], bit_set[: len(words)]
                np.less(words, self.level, out=here.view(np.bool_))
                np.multiply(here, np.uint8(1 << bit), out=here)  # a shift of bytes is not done many at a time
                np.bitwise_or(part, here, out=part)

    def _begin(self, place: Place) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.uint64]]]:
        """Block -> the states in which the streams of all tasks begin, (T, 4)."""
        if not self._states:
            height = (place.shape or (0, 0))[0]
            names = [name for name, _, _ in replace(place, start=0).blocks(height)]
            x, contents = self.x, self.x.contents
            states = states_of([seed_of(x.seed, x.module, name, content) for name in names for content in contents])
            self._states = dict(zip(names, states.reshape(len(names), len(contents), 4), strict=True))
        return self._states

    def drop(self, task: int, part: Tensor, place: Place) -> Tensor:
        """Zero the entries of a task's part that are not kept, in place."""
        if not self.acts_on(task):
            return part
        if part.is_cuda and place.shape is not None and not self.x.members:
            first = task // TOGETHER * TOGETHER
            return part.mul_(bit_of(self._sent_to(part, first, place), task - first))
        return part.mul_(_ones_below(self.x, task, place, self.level, part))

    def _sent_to(self, part: Tensor, first: int, place: Place) -> Tensor:
        """The bits of eight tasks' entries, on a GPU."""
        key = first, place.start
        if self._sent is None or self._sent[0] != key:
            bits, tasks = _for_gpu(part, torch.uint8), slice(first, min(first + TOGETHER, len(self.ranks)))
            self.fill(tasks, place, bits.numpy(), cores(_MOST))
            self._sent = key, bits.to(part.device, non_blocking=True)
        return self._sent[1]


def _for_gpu(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory that a GPU reads by itself, so that it arrives while the CPU goes on."""
    return torch.empty(part.shape, dtype=dtype, pin_memory=True)


def fill_rows(place: Place, out: Drawn, make: Callable[[str, Drawn], None], threads: int) -> None:
    """Fill whole rows block by block, as a GPU wants them: by several threads, as one core would take longer than all the rest.

    Args:
        place: Where the rows begin.
        out: (rows, all columns).
        make: Fills a block, (n,), by its name.
        threads: How many.
    """

    def one(block: tuple[str, int, int]) -> None:
        name, start, stop = block
        rows = out[max(0, start - place.start) : stop - place.start]
        if len(rows) == stop - start:
            make(name, rows.reshape(-1))
            return
        whole = np.empty((stop - start, out.shape[1]), out.dtype)
        make(name, whole.reshape(-1))
        rows[:] = whole[max(0, place.start - start) :][: len(rows)]

    in_threads(one, list(place.blocks(len(out))), threads, lambda: None)


def bit_of(bits: Tensor, bit: int) -> Tensor:
    """1 where a bit is set, else 0: what a part is multiplied by."""
    return bits.bitwise_right_shift(bit).bitwise_and_(1)


def kept_at_random(x: MergeInputs, density: float) -> Callable[[Iterable[Tensor], Place], Iterator[Tensor]]:
    """A step that keeps each entry with probability `density` and divides it by that, in place."""
    drops = Drops(x, density)

    def step(parts: Iterable[Tensor], place: Place) -> Iterator[Tensor]:
        for task, part in enumerate(parts):
            part = drops.drop(task, part, place)
            yield part.mul_(drops.scale) if drops.acts_on(task) else part

    return step


def _ones_below(x: MergeInputs, task: int, place: Place, level: int, like: Tensor) -> Tensor:
    """1.0 where the draw is below `level`, else 0.0."""
    shape = tuple(like.shape)
    if x.members or place.shape is None or like.is_cuda:
        return ones_where(draw(x, task, place, shape) < level, like)
    # A mask of a whole block, looked at while its draws are in a core's cache.
    below = _of_blocks(
        place, task, shape, lambda name, rows, width: (_drawn(x, task, name, (rows, width)) < level).view(np.int8)
    )
    return place.spare.like("ones", like).copy_(torch.from_numpy(below))
