"""Random masks that follow (seed, module, place, content of the adapter) and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.inputs import MergeInputs
from plait.seeds import seed_of

# Keeping is decided by 16 random bits an entry, several times cheaper than a float; the rescaling uses the probability
# that 16 bits express, so the expectation is exact.
LEVELS = 1 << 16


def draw(
    x: MergeInputs, task: int, place: str, shape: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Uniform integers in [0, 65536) for one task's entries at one place; on the CPU whatever the device."""
    if x.members:
        return np.stack([draw(member, task, place, shape[1:]) for member in x.members])
    stream = np.random.SFC64(seed_of(x.seed, x.module, place, x.contents[task]))
    count = math.prod(shape)
    words: np.ndarray[tuple[int, ...], np.dtype[np.uint16]] = stream.random_raw(-(-count // 4)).view(np.uint16)
    return words[:count].reshape(shape)


def ones_where(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], like: Tensor) -> Float[Tensor, ...]:
    """A mask as 0.0 and 1.0 of another tensor's dtype and device."""
    return torch.from_numpy(mask.view(np.int8)).to(like.device).to(like.dtype)


def kept_at_random(x: MergeInputs, density: float) -> Callable[[Iterable[Tensor], str], Iterator[Tensor]]:
    """A step that keeps each entry with probability `density` and divides it by that, in place."""
    level = max(1, round(density * LEVELS))

    def step(parts: Iterable[Tensor], place: str) -> Iterator[Tensor]:
        for task, part in enumerate(parts):
            if level < LEVELS and x.ranks[task]:
                part *= ones_where(draw(x, task, place, tuple(part.shape)) < level, part)
                part *= LEVELS / level
            yield part

    return step
