"""Modules side by side: a thread for each core, in which torch computes alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

# Each worker holds one module of all tasks, so memory grows with their number.
_MOST = 4
# Seconds after which a thread of Python gives way; with the usual 5 ms one that comes back from reading, hashing or a product
# waits longer for its turn than it was away.
_TURN = 5e-4


def side_by_side(function: Callable[[S], T], items: Sequence[S], device: torch.device) -> list[T]:
    """The function of every item, in order.

    Matrices of a lossless core are too small for torch's own threads, which mostly wait for each other; whole modules
    are not. Every module is computed by one thread alone, so its bits do not depend on how many there are. torch's
    thread count and the turn of Python's threads, which hold for the process, are set meanwhile and put back.
    """
    threads = torch.get_num_threads()
    count = min(threads, len(items), _MOST) if device.type == "cpu" else 1
    if count <= 1:
        return [function(item) for item in items]
    turn = sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(min(turn, _TURN))
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(turn)
