"""Modules side by side, a thread for each core, or one by one: in threads in which torch computes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from plait.adapters.one_thread import alone
from plait.merging.light.threads import in_threads

S = TypeVar("S")
T = TypeVar("T")

# Each worker holds one module of all tasks, so memory grows with their number.
_MOST = 4


def side_by_side(function: Callable[[S], T], items: Sequence[S], device: torch.device) -> list[T]:
    """The function of every item, in order.

    Matrices of a lossless core are too small for torch's own threads, which mostly wait for each other; whole modules
    are not. Every module is computed by one thread alone, so its bits do not depend on how many there are. torch's
    thread count and the turn of Python's threads, which hold for the process, are set meanwhile and put back.
    """
    if device.type != "cpu":
        return [function(item) for item in items]
    count = min(torch.get_num_threads(), len(items), _MOST)
    if count <= 1:  # not by torch's threads either, which would add up in another order
        return one_by_one(function, items)
    with alone():
        return in_threads(function, items, count, partial(torch.set_num_threads, 1))


def one_by_one(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """The function of every item, in order and in this thread.

    For what is soon done: every copy of a few hundred kilobytes leaves Python's lock, and two threads that hand it to and fro
    take longer than one. The bits are those of `side_by_side`.
    """
    with alone():
        return [function(item) for item in items]
