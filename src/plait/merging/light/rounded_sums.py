"""Weighted sums of factors as they are stored in 16 bits, and what rounding them took: block of rows by block of rows, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from plait.adapters.arrays import BFLOAT16, FLOAT32, Array, Kind, all_finite, floats, rounded
from plait.adapters.lora import LoraFactors
from plait.merging.light.exponents import Moves
from plait.merging.light.short_rows import short_rows
from plait.merging.light.sums import Part, Probes, pieces, product, stacked, times_rows


@dataclass(frozen=True, slots=True)
class RoundedSum:
    """A sum in a type of 16 bits, and what became of it on the way.

    Args:
        factors: As they are stored.
        finite: Whether every number of B is finite in float32.
        fits: Whether every number is finite in the type.
        taken: What `plait.merging.light.sums.rounding` says of it; the second is asked for where nothing was taken, and may not be needed.
    """

    factors: LoraFactors
    finite: bool
    fits: bool
    taken: tuple[float, float | Callable[[], float]]


def rounded_sum(parts: Sequence[Part], dtype: str, probes: Probes) -> RoundedSum:
    """Put factors beside each other as they are stored, and measure what rounding takes.

    The bits are those of `light.sums.stored_sum`, and what is taken is that of `light.sums.rounding`. A block of rows goes
    through all steps while it lies in a core's cache: larger arrays cost more in memory than in arithmetic.

    Args:
        parts: At least one; all of one (out, in).
        dtype: "float16" or "bfloat16".
        probes: X, transposed.
    """
    exact_A = stacked(parts, dtype)
    if exact_A.dtype.name == dtype and (copied := _copied_sum(parts, exact_A, probes)) is not None:
        return copied
    A = exact_A if exact_A.dtype.name == dtype else rounded(floats(exact_A), dtype)
    inner = times_rows(probes, exact_A)
    stored_inner = inner if A is exact_A else times_rows(probes, A)
    bits = np.empty((parts[0][1].shape[0], A.shape[0]), np.uint16)
    B = Array(bits if dtype == BFLOAT16 else bits.view(np.float16), Kind(dtype))
    wanted, stored = np.empty((2, len(probes), len(bits)), np.float32)
    finite, fits = True, A is exact_A or all_finite(A)  # A that is as it was read was looked at then
    blocks = list(pieces(inner, len(bits)))
    rows = short_rows(parts, dtype, max((stop - start for start, stop in blocks), default=0))
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in blocks:
            rows.bits(start, stop, bits[start:stop])
            exact = rows.exact()
            if not all_finite(Array(B.data[start:stop], B.dtype)):
                finite, fits = finite and all_finite(Array(exact, Kind(FLOAT32))), False
            wanted[:, start:stop] = product(inner, exact)
            stored[:, start:stop] = product(stored_inner, rows.stored())
        stored -= wanted
        taken = float(np.vdot(stored, stored)), float(np.vdot(wanted, wanted))
    return RoundedSum(LoraFactors(A, B, 1.0, parts[0][1].kind), finite, fits, taken)  # type: ignore[arg-type]


def _copied_sum(parts: Sequence[Part], A: Array, probes: Probes) -> RoundedSum | None:
    """A sum in which no number is rounded, from the bits of its inputs; None where one may have to be."""
    dtype = A.dtype.name
    moves = Moves.of(parts, dtype)
    B = moves and moves.whole()
    if moves is None or B is None:
        return None

    def size() -> float:  # from the inputs: what was made of them is not held until then
        with np.errstate(over="ignore", invalid="ignore"):
            inner, whole = times_rows(probes, stacked(parts, dtype)), moves.whole()
            return float(np.square(times_rows(inner, whole)).sum()) if whole else 0.0

    return RoundedSum(LoraFactors(A, B, 1.0, parts[0][1].kind), True, True, (0.0, size))  # type: ignore[arg-type]
