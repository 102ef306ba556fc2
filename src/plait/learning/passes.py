"""The texts of a step in passes of like length, so that hardly any pads are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from plait.model.rowbank import Prices, cheapest_cuts

# A pass with fewer tokens takes as long as one with so many: on a GPU launching its kernels takes the time, on a CPU products of a few
# rows are slow.
FLOOR = {"cuda": 16_384, "cpu": 128}


def passes_of(lengths: Sequence[int], device: str) -> list[list[int]]:
    """Cut texts into passes so that as few tokens as possible are computed, pads among them.

    >>> passes_of([100, 9, 90, 10, 11], "cuda")
    [[0, 1, 2, 3, 4]]
    >>> passes_of([100, 9, 90, 10, 11] * 4, "cpu")[0]
    [1, 3, 4, 6, 8, 9, 11, 13, 14, 16, 18, 19]

    Args:
        lengths: Tokens of each text.
        device: Type of the device.

    Returns:
        Places of the texts of each pass, in their order; short texts first.

    Cost: a dynamic programme over the texts, quadratic in their number.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(sizes, kind="stable")
    starts, _ = cheapest_cuts(sizes[order][None], 1, Prices(FLOOR.get(device, FLOOR["cuda"])))
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(int(starts[0, cuts[-1]]))
    bounds = cuts[::-1]
    return [sorted(order[a:b].tolist()) for a, b in pairwise(bounds)]


def by_part(keys: Sequence[tuple[int, int]], places: Sequence[int]) -> Iterator[tuple[int, slice, list[int]]]:
    """Say of each part in a pass where its texts lie there, and which they are.

    >>> list(by_part([(0, 7), (0, 3), (1, 5)], [1, 2]))
    [(0, slice(0, 1, None), [3]), (1, slice(1, 2, None), [5])]

    Args:
        keys: Part and text of all texts of the step, part by part.
        places: Places of the pass's texts among them, in order.
    """
    at = 0
    for part in dict.fromkeys(keys[p][0] for p in places):
        texts = [keys[p][1] for p in places if keys[p][0] == part]
        yield part, slice(at, at + len(texts)), texts
        at += len(texts)
