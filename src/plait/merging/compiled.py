"""Loops over entries that Numba compiles, where it is installed: one pass where torch and NumPy take a dozen.

`pip install plait[fast]` brings it. What they give is what the passes give, to the bit, so results do not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Entries from which importing and compiling, about a second and a half, are repaid; passes take two to three nanoseconds more an entry.
_REPAID = 1 << 29
# Numbers of each array that are gone through together: a core's nearest cache holds them all.
_CHUNK = 1024
# Values of which it is found out together whether one is wanted: few of so many are.
_FEW = 32

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops, each of arrays of float32 and without Python's lock.

    Args:
        drop: (part, draws, level): zero in place where the draw is not below the level; both (rows, columns).
        vote: (parts (k, n), bounds (k,), weights (k,), total, mass, votes, turnout): of what lies outside [-bound, bound], times
            its weight, add the values, their magnitudes, their signs by weight, and their number by |weight| to four sums of (n,).
        elect: (total, mass, votes, turnout, mean, out): the sum, or mean, of what has the elected sign, into out (rows, columns).
        count: (values (k, n), low (k,), high (k,), inside (k, n), above (k,), held (k,)): per row, how many magnitudes lie above,
            and how many within [low, high], which begin the row of `inside`.
    """

    drop: Callable[..., None]
    vote: Callable[..., None]
    elect: Callable[..., None]
    count: Callable[..., None]


def loops_for(entries: int) -> Loops | None:
    """The loops, where so many entries of all tasks repay them and Numba is there."""
    return _loops() if entries >= _REPAID else None


@functools.cache
def _loops() -> Loops | None:
    try:
        import numba
    except ImportError:
        return None
    # Without fastmath: sums keep their order, and no product is joined with a sum.
    compiled: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)
    return Loops(drop=compiled(_drop), vote=compiled(_vote), elect=compiled(_elect), count=compiled(_count))


def _drop(part: Any, draws: Any, level: Any) -> None:
    for row in range(part.shape[0]):
        p, d = part[row], draws[row]
        for i in range(p.size):
            p[i] *= _ONE if d[i] < level else _ZERO


def _vote(parts: Any, bounds: Any, weights: Any, total: Any, mass: Any, votes: Any, turnout: Any) -> None:
    for start in range(0, total.size, _CHUNK):
        stop = min(total.size, start + _CHUNK)
        t, m, v, n = total[start:stop], mass[start:stop], votes[start:stop], turnout[start:stop]
        for task in range(parts.shape[0]):
            p, bound, weight = parts[task, start:stop], bounds[task], weights[task]
            size = abs(weight)
            for i in range(p.size):
                x = p[i]
                kept = _ZERO if (x >= -bound) & (x <= bound) else x
                v[i] += (weight if kept > _ZERO else _ZERO) - (weight if kept < _ZERO else _ZERO)
                n[i] += size if kept != _ZERO else _ZERO
                kept = kept * weight
                t[i] += kept
                m[i] += abs(kept)


def _elect(total: Any, mass: Any, votes: Any, turnout: Any, mean: Any, out: Any) -> None:
    least = np.float32(1.1754943508222875e-38)
    columns = out.shape[1]
    for row in range(out.shape[0]):
        start, stop = row * columns, (row + 1) * columns
        t, m, v, n, o = total[start:stop], mass[start:stop], votes[start:stop], turnout[start:stop], out[row]
        for i in range(o.size):
            sign = np.copysign(_ONE, t[i])
            chosen = (t[i] + m[i] * sign) * _HALF
            agreed = (n[i] + v[i] * sign) * _HALF
            o[i] = chosen / (agreed if agreed > least else least) if mean else chosen


def _count(values: Any, lows: Any, highs: Any, inside: Any, above: Any, held: Any) -> None:
    for group in range(values.shape[0]):
        v, low, high, out = values[group], lows[group], highs[group], inside[group]
        higher = n = 0
        for start in range(0, v.size, _FEW):
            few = v[start : start + _FEW]
            over = reached = np.int32(0)
            for i in range(few.size):
                magnitude = abs(few[i])
                over += np.int32(magnitude > high)
                reached += np.int32(magnitude >= low)
            higher += int(over)
            if reached != over:  # some inside: written without a branch each, one over another until one counts
                for i in range(few.size):
                    magnitude = abs(few[i])
                    out[n] = magnitude
                    n += int((magnitude >= low) & (magnitude <= high))
        above[group], held[group] = higher, n
