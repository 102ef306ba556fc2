"""Rows of B of every part, multiplied, rounded to 16 bits and put beside each other: what a sum writes, and is checked against.

Inputs of 16 bits have 65,536 different numbers at most: what becomes of each is known before, and looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from plait.adapters.arrays import BFLOAT16, FLOAT16, Array, Floats, Kind, array_of, floats, rounded
from plait.merging.light.exponents import Moves, bits_beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from plait.adapters.lora import LoraFactors

# Different numbers that multiply up to which they are looked up: for each there is a table, which is to stay in a core's cache.
_TABLES = 8


class ShortRows(Protocol):
    """Rows that are asked for block by block; what it gives is valid until the next block, and of one thread."""

    def bits(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write the bits of rows [start, stop) into (stop - start, sum of ranks) of uint16."""

    def exact(self) -> Floats:
        """Give the last block in float32, not rounded."""

    def stored(self) -> Floats:
        """Give the last block in float32, rounded; `exact` must have been asked for before."""


def short_rows(parts: Sequence[tuple[float, LoraFactors]], dtype: str, most: int) -> ShortRows:
    """Choose how the rows of coefficients and factors are made.

    Args:
        parts: At least one; all of one (out, in).
        dtype: "float16" or "bfloat16".
        most: The most rows that are asked for at once.
    """
    if not _alike(parts, dtype):
        return _Plain(parts, dtype)
    return _Bfloats(parts, most) if dtype == BFLOAT16 else _looked_up(parts, dtype, most) or _Plain(parts, dtype)


def _alike(parts: Sequence[tuple[float, LoraFactors]], dtype: str) -> bool:
    return all(array_of(f.B).dtype.name == dtype for _, f in parts)


def _looked_up(parts: Sequence[tuple[float, LoraFactors]], dtype: str, most: int) -> ShortRows | None:
    """Look rows up, where their type is the result's and few different numbers multiply."""
    few = len(_runs(_factors(parts), [f.rank for _, f in parts])) <= _TABLES
    return _LookedUp(parts, dtype, most) if few and _alike(parts, dtype) else None


def rows_in(parts: Sequence[tuple[float, LoraFactors]], dtype: str, most: int) -> Callable[[int, int], NDArray[Any]]:
    """Give what makes rows [start, stop) as an array of any type stores them; arguments and validity as above."""
    if dtype not in (BFLOAT16, FLOAT16):
        return lambda start, stop: rounded(beside(parts, start, stop), dtype).data
    moves, memory = Moves.of(parts, dtype), np.empty((most, sum(f.rank for _, f in parts)), np.uint16)
    multiplied = functools.cache(lambda: _looked_up(parts, dtype, most) or short_rows(parts, dtype, most))

    def made(start: int, stop: int) -> NDArray[Any]:
        rows = memory[: stop - start]
        if moves is None or not moves.rows(start, stop, rows):
            multiplied().bits(start, stop, rows)
        return rows

    return made


def beside(parts: Sequence[tuple[float, LoraFactors]], start: int, stop: int) -> Floats:
    """Rows of B of every part times what multiplies it, one beside another, in float32."""
    arrays, ranks = [array_of(f.B) for _, f in parts], [f.rank for _, f in parts]
    if len({B.dtype.name for B in arrays}) == 1:  # rows of one adapter are too short to be worth a pass each
        block = floats(Array(np.concatenate([B.data[start:stop] for B in arrays], axis=1), arrays[0].dtype))
    else:
        block = np.concatenate([floats(Array(B.data[start:stop], B.dtype)) for B in arrays], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is for the caller to see
        block *= np.repeat(_factors(parts), ranks)
    return block


def _factors(parts: Sequence[tuple[float, LoraFactors]]) -> Floats:
    with np.errstate(over="ignore"):
        return np.array([c * f.scaling for c, f in parts], np.float32)


class _Plain:
    """Of inputs of any type."""

    def __init__(self, parts: Sequence[tuple[float, LoraFactors]], dtype: str) -> None:
        self._parts, self._dtype = parts, dtype

    def bits(self, start: int, stop: int, out: NDArray[Any]) -> None:
        self._exact = beside(self._parts, start, stop)
        self._short = rounded(self._exact, self._dtype)
        out[...] = self._short.data.view(np.uint16)

    def exact(self) -> Floats:
        return self._exact

    def stored(self) -> Floats:
        return floats(self._short)


class _Bfloats:
    """Of bfloat16 alone: float32 is the same bits and sixteen zeros, which a product fills and rounding takes away, halves to even.

    Memory is used again for every block: a new array costs more than what is done with it.
    """

    def __init__(self, parts: Sequence[tuple[float, LoraFactors]], most: int) -> None:
        ranks, factors = [f.rank for _, f in parts], _factors(parts)
        self._sources = [array_of(f.B).data for _, f in parts]
        alike = len(_runs(factors, ranks)) == 1
        self._factors = factors[:1] if alike else np.tile(np.repeat(factors, ranks), (most, 1))
        self._exact, self._stored = np.empty((2, most, sum(ranks)), np.uint32)
        self._count = 0

    def bits(self, start: int, stop: int, out: NDArray[Any]) -> None:
        count = self._count = stop - start
        exact, stored = self._exact[:count], self._stored[:count]
        bits_beside(self._sources, start, stop, out)
        np.left_shift(out, np.uint32(16), out=exact, dtype=np.uint32)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is for the caller to see
            np.multiply(exact.view(np.float32), self._factors[:count], out=exact.view(np.float32))
        np.right_shift(exact, np.uint32(16), out=stored)
        stored &= np.uint32(1)
        stored += np.uint32(0x7FFF)
        stored += exact
        stored >>= np.uint32(16)
        out[...] = stored

    def exact(self) -> Floats:
        return self._exact[: self._count].view(np.float32)

    def stored(self) -> Floats:
        stored = self._stored[: self._count]
        stored <<= np.uint32(16)
        return stored.view(np.float32)


class _LookedUp:
    """Of the result's type alone: every number of 16 bits multiplied and rounded once, and looked up.

    That is as fast as arithmetic for the bits of bfloat16, which are compared in this other way than they were made, and for float16
    several times faster: NumPy takes long to convert it.
    """

    def __init__(self, parts: Sequence[tuple[float, LoraFactors]], dtype: str, most: int) -> None:
        ranks, factors = [f.rank for _, f in parts], _factors(parts)
        self._sources = [array_of(f.B).data.view(np.uint16) for _, f in parts]
        self._dtype, self._runs, self._factors = dtype, _runs(factors, ranks), np.repeat(factors, ranks)
        self._given = np.empty((most, sum(ranks)), np.uint16)
        self._place = np.empty(self._given.shape, np.intp)
        self._bits = self._given

    def bits(self, start: int, stop: int, out: NDArray[Any]) -> None:
        given, place, self._bits = self._given[: stop - start], self._place[: stop - start], out
        bits_beside(self._sources, start, stop, given)
        place[...] = given
        for first, last, factor in self._runs:
            table = _multiplied(factor, self._dtype)
            if len(self._runs) == 1:
                table.take(place, out=out, mode="clip")
            else:
                out[:, first:last] = table.take(place[:, first:last], mode="clip")

    def exact(self) -> Floats:
        wide = floats(_short(self._given[: len(self._bits)], self._dtype))
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is for the caller to see
            wide *= self._factors
        return wide

    def stored(self) -> Floats:
        return floats(_short(self._bits, self._dtype))


def _runs(factors: Floats, ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Ranges of columns that one number multiplies, and its bits, of which 0 and -0 have others."""
    runs: list[tuple[int, int, int]] = []
    stop = 0
    for factor, rank in zip(factors.view(np.uint32).tolist(), ranks, strict=True):
        start, stop = stop, stop + rank
        if runs and runs[-1][2] == factor:
            start = runs.pop()[0]
        runs.append((start, stop, factor))
    return runs


@functools.lru_cache(maxsize=2 * _TABLES)
def _multiplied(factor: int, dtype: str) -> NDArray[Any]:
    """Every number of a type, by its bits, times one of float32, by its own: the bits of what it is rounded to."""
    wide = floats(_short(np.arange(1 << 16, dtype=np.uint16), dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(wide * np.array(factor, np.uint32).view(np.float32), dtype).data.view(np.uint16)


def _short(bits: NDArray[Any], dtype: str) -> Array:
    """Bits as numbers of a type."""
    return Array(bits if dtype == BFLOAT16 else bits.view(np.float16), Kind(dtype))
