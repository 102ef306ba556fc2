"""Loops over entries that Numba compiles, where it is installed: one pass where torch and NumPy take a dozen.

`pip install plait[fast]` brings it. What they give is what the passes give, to the bit, so results do not depend on it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Entries from which importing and compiling, about a second and a half, are repaid; passes take two to three nanoseconds more an entry.
_REPAID = 1 << 29
# Numbers of each array that are gone through together: a core's nearest cache holds them all.
CHUNK = 1024
# Values of which it is found out together whether one is wanted, and where one is, of those in each part of them: few of so many are.
_FEW, _FEWER = 32, 8

_COMPILING = threading.Lock()
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops, each of arrays of float32 and without Python's lock.

    Args:
        keep: (states (k, 4), level, words, out (n,)): draw 16 random bits an entry from k of NumPy's SFC64 streams, whose states
            move on, and set bit t of an entry where those of stream t are below the level; `words`, of uint64, are for use meanwhile.
        elect: (parts (k, rows, columns), kept, bounds (k,), weights (k,), sums, first, last, mean, scale, out): of what lies outside
            [-bound, bound], times its weight, add the values, their magnitudes, their signs by weight, and their number by |weight|
            to four sums, which begin at zero with the first parts; with the last, the sum, or mean, of what has the elected sign goes
            into out (rows, columns), times the scale. `kept` is None, or says by bit t of every entry whether part t's stays, or is
            zero. `sums` is (4, rows, columns), or (4, 1, `CHUNK`) where the first parts are the last, which stays in a core's nearest
            cache.
        count: (values (k, n), low (k,), high (k,), inside (k, N), above (k,), held (k,)): per row, add the number of magnitudes
            above to `above`, and of those within [low, high] to `held`, in whose place in the row of `inside` they are put.
    """

    keep: Callable[..., None]
    elect: Callable[..., None]
    count: Callable[..., None]


def loops_for(entries: int) -> Loops | None:
    """The loops, where so many entries of all tasks repay them and Numba is there; compiled by the first thread that asks."""
    if entries < _REPAID:
        return None
    with _COMPILING:
        return _loops()


@functools.cache
def _loops() -> Loops | None:
    try:
        import numba
    except ImportError:
        return None
    # Without fastmath: sums keep their order, and no product is joined with a sum.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}

    def compiled(function: Callable[..., None]) -> Any:
        try:  # kept for the next process where Python keeps its own, else in the user's cache
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither can be written
            return numba.njit(**options)(function)

    return Loops(keep=compiled(_keep), elect=compiled(_elect), count=compiled(_count))


def _keep(states: Any, level: Any, words: Any, out: Any) -> None:
    shorts, one = words.view(np.uint16), np.uint64(1)
    for start in range(0, out.size, shorts.size):
        part = out[start : start + shorts.size]
        for i in range(part.size):
            part[i] = 0
        for task in range(states.shape[0]):
            a, b, c, n = states[task, 0], states[task, 1], states[task, 2], states[task, 3]
            for i in range((part.size + 3) // 4):
                word = a + b + n
                n += one
                a = b ^ (b >> np.uint64(11))
                b = c + (c << np.uint64(3))
                c = ((c << np.uint64(24)) | (c >> np.uint64(40))) + word
                words[i] = word
            states[task, 0], states[task, 1], states[task, 2], states[task, 3] = a, b, c, n
            bit = np.uint8(1 << task)
            for i in range(part.size):
                part[i] |= bit if shorts[i] < level else np.uint8(0)


def _elect(
    parts: Any, kept: Any, bounds: Any, weights: Any, sums: Any, first: Any, last: Any, mean: Any, scale: Any, out: Any
) -> None:
    least = np.float32(1.1754943508222875e-38)
    tasks, rows, columns = parts.shape
    for row in range(rows):
        for start in range(0, columns, CHUNK):
            stop = min(columns, start + CHUNK)
            line, begin = (row, start) if sums.shape[1] == rows and sums.shape[2] == columns else (0, 0)
            end = begin + stop - start
            t, m, v, n = (
                sums[0, line, begin:end],
                sums[1, line, begin:end],
                sums[2, line, begin:end],
                sums[3, line, begin:end],
            )
            if first:
                for i in range(t.size):
                    t[i] = m[i] = v[i] = n[i] = _ZERO
            if kept is not None:
                k = kept[row, start:stop]
                for task in range(tasks):
                    p, bit = parts[task, row, start:stop], np.uint8(1 << task)
                    for i in range(p.size):
                        p[i] *= _ONE if (k[i] & bit) == bit else _ZERO
            for task in range(0, tasks, 2):  # two at a time: the sums are read and written half as often
                other = min(task + 1, tasks - 1)
                p, q = parts[task, row, start:stop], parts[other, row, start:stop]
                below, beneath, weight = bounds[task], bounds[other], weights[task]
                further = weights[other] if other > task else _ZERO
                size, width = abs(weight), abs(further)
                for i in range(p.size):
                    x, y = p[i], q[i]
                    x = _ZERO if abs(x) <= below else x
                    y = _ZERO if abs(y) <= beneath else y
                    there, here = x != _ZERO, y != _ZERO
                    x *= weight
                    y *= further
                    v[i] = (v[i] + (np.copysign(size, x) if there else _ZERO)) + (
                        np.copysign(width, y) if here else _ZERO
                    )
                    n[i] = (n[i] + (size if there else _ZERO)) + (width if here else _ZERO)
                    t[i] = (t[i] + x) + y
                    m[i] = (m[i] + abs(x)) + abs(y)
            if last:
                o = out[row, start:stop]
                for i in range(o.size):
                    sign = np.copysign(_ONE, t[i])
                    chosen = (t[i] + m[i] * sign) * _HALF
                    agreed = (n[i] + v[i] * sign) * _HALF
                    o[i] = (chosen / (agreed if agreed > least else least) if mean else chosen) * scale


def _count(values: Any, lows: Any, highs: Any, inside: Any, above: Any, held: Any) -> None:
    for group in range(values.shape[0]):
        v, low, high, out = values[group], lows[group], highs[group], inside[group]
        # A count for each place among the few: one for all of them would be added up across every time.
        over, higher, n = np.zeros(_FEW, np.int32), 0, held[group]
        whole = v.size // _FEW * _FEW
        for start in range(0, whole, _FEW):
            part, some = v[start : start + _FEW], False
            for i in range(_FEW):
                magnitude = abs(part[i])
                over[i] += np.int32(magnitude > high)
                some |= (magnitude >= low) & (magnitude <= high)
            if not some:
                continue
            for fewer in range(start, start + _FEW, _FEWER):
                some = False
                for i in range(_FEWER):
                    magnitude = abs(v[fewer + i])
                    some |= (magnitude >= low) & (magnitude <= high)
                if some:  # written without a branch each, one over another until one counts
                    for i in range(fewer, fewer + _FEWER):
                        magnitude = abs(v[i])
                        out[n] = magnitude
                        n += int((magnitude >= low) & (magnitude <= high))
        for i in range(_FEW):
            higher += int(over[i])
        for i in range(whole, v.size):
            magnitude = abs(v[i])
            if magnitude > high:
                higher += 1
            elif magnitude >= low:
                out[n] = magnitude
                n += 1
        above[group] += higher
        held[group] = n
