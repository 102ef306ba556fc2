"""Factors times powers of two, put beside each other as bits: to multiply a number of 16 bits so is to move its exponent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.adapters.arrays import BFLOAT16, FLOAT16, Array, Kind, array_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from plait.adapters.lora import LoraFactors

# Exponents are moved by this many places at most, so that one look at the smallest and the largest number tells whether all can be.
_FARTHEST = 8
_PLACE = 1 << 7  # bfloat16 has seven digits below its exponent
_SMALLEST, _TOO_LARGE = (_FARTHEST + 1) * _PLACE, (0xFF - _FARTHEST) * _PLACE
# Entries that are gone through together, which stay in a core's cache.
_TOGETHER = 1 << 17


@dataclass(frozen=True, slots=True)
class Moves:
    """What becomes of the bits of B's columns, all parts beside each other.

    Args:
        sources: B of every part, its bits.
        dtype: "bfloat16" or "float16".
        step: Per column, or one for all, what is added to the bits; None where nothing is.
        flip: Likewise the sign where it is turned; None where none is.
    """

    sources: Sequence[NDArray[Any]]
    dtype: str
    step: NDArray[Any] | None
    flip: NDArray[Any] | None

    @classmethod
    def of(cls, parts: Sequence[tuple[float, LoraFactors]], dtype: str) -> Moves | None:
        """From coefficients and factors that are added up; None where a product may have to be rounded.

        That is where a factor is of another type, or what multiplies it no power of two, or one far from 1. Half precision has
        so narrow a range that some number of most matrices would be rounded: there only 1 will do.
        """
        arrays = [array_of(f.B) for _, f in parts]
        if dtype not in (BFLOAT16, FLOAT16) or any(a.dtype.name != dtype for a in arrays):
            return None
        with np.errstate(over="ignore"):  # infinity is no power of two
            factors = np.array([c * f.scaling for c, f in parts], np.float32)
        shares, exponents = np.frexp(factors)
        places = exponents - 1
        if (np.abs(shares) != 0.5).any() or (np.abs(places) > (_FARTHEST if dtype == BFLOAT16 else 0)).any():
            return None
        ranks = [f.rank for _, f in parts]
        steps, signs = (
            (places * _PLACE).astype(np.int16).view(np.uint16),
            np.where(shares < 0, 0x8000, 0).astype(np.uint16),
        )
        step, flip = (_by_column(each, ranks) if each.any() else None for each in (steps, signs))
        return cls([a.data.view(np.uint16) for a in arrays], dtype, step, flip)

    def rows(self, start: int, stop: int, out: NDArray[Any]) -> bool:
        """Write the bits of rows [start, stop); False where a number is too small or too large for its exponent to be moved."""
        bits_beside(self.sources, start, stop, out)
        if self.step is not None and out.size:
            sizes = out & np.uint16(0x7FFF)
            if int(sizes.max()) >= _TOO_LARGE:
                return False
            if int(sizes.min()) >= _SMALLEST:
                out += self.step
            else:  # zeros stay as they are, and whatever else is so small is not for here
                is_zero = sizes == 0
                if int(sizes.min(where=~is_zero, initial=_TOO_LARGE)) < _SMALLEST:
                    return False
                out += self.step * ~is_zero
        if self.flip is not None:
            out ^= self.flip
        return True

    def whole(self) -> Array | None:
        """Give all rows, or None where `rows` does not."""
        count, width = len(self.sources[0]), sum(int(s.shape[1]) for s in self.sources)
        bits: NDArray[Any] = np.empty((count, width), np.uint16)
        together = max(1, _TOGETHER // max(1, width))
        for start in range(0, count, together):
            if not self.rows(start, start + together, bits[start : start + together]):
                return None
        return Array(bits if self.dtype == BFLOAT16 else bits.view(np.float16), Kind(self.dtype))


def bits_beside(sources: Sequence[NDArray[Any]], start: int, stop: int, out: NDArray[Any]) -> None:
    """Put rows [start, stop) of matrices beside each other; of equal widths, a row is copied as one number of many bytes."""
    width = sources[0].shape[1]
    if width and all(s.shape[1] == width and s.flags.c_contiguous for s in sources) and out.flags.c_contiguous:
        row = f"V{out.itemsize * width}"
        np.concatenate([s[start:stop].view(row) for s in sources], axis=1, out=out.view(row))
    else:
        np.concatenate([s[start:stop] for s in sources], axis=1, out=out)


def _by_column(each: NDArray[Any], ranks: Sequence[int]) -> NDArray[Any]:
    """What belongs to each part for each of its columns; one number where they are the same, which takes a third of the time."""
    return each[:1] if (each == each[0]).all() else np.repeat(each, ranks)
