"""Work on two or more cores without torch: a thread for each, that hand Python's lock on quickly."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

# Seconds after which a thread of Python gives way; with the usual 5 ms one that comes back from reading, hashing or a product
# waits longer for its turn than it was away.
_TURN = 5e-4


def cores(most: int) -> int:
    """How many cores this process may use, no more than that; OMP_NUM_THREADS limits them as it does torch's."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, there, int(told) if told.isdecimal() and int(told) else there))


def in_threads(function: Callable[[S], T], items: Sequence[S], count: int, begin: Callable[[], None]) -> list[T]:
    """The function of every item, in order.

    Args:
        function: Leaves Python's lock for most of its time.
        items: What it is called with.
        count: How many threads work.
        begin: Called in each of them first.
    """
    with quick_turns(), ThreadPoolExecutor(count, initializer=begin) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def quick_turns() -> Iterator[None]:
    """Have threads hand Python's lock on quickly; the setting, which holds for the process, is put back."""
    turn = sys.getswitchinterval()
    sys.setswitchinterval(min(turn, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
