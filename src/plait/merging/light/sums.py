"""Weighted sums of factors, and whether what was written is the sum that was asked for, on NumPy arrays: without torch and beside it.

A sum is factors beside each other: A as it is, and in B what multiplies an adapter. In 16 bits the first is exact, and the
second wherever that number is a power of two; else B is rounded once, and the rounding is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from plait.adapters.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, Floats, array_of, floats, rounded
from plait.adapters.lora import LoraFactors
from plait.errors import RunError
from plait.merging.light.short_rows import rows_in
from plait.seeds import seed_of

Part = tuple[float, LoraFactors]  # a coefficient, the scale of the merge in it, and the factors that it multiplies
Probes: TypeAlias = Floats  # (k, in), float32
_PROBES = 4
# Multiplications up to which OpenBLAS starts no threads (65536 times its GEMM_MULTITHREAD_THRESHOLD of 4).
_ALONE = 1 << 18
# Entries that are gone through together, which stay in a core's cache.
_TOGETHER = 1 << 17
# Up to this width a matrix times few columns is several times faster than few rows times its transpose, which BLAS packs; from a few
# thousand on slower.
_NARROW = 512
# A sum is first compared in float32; an error above this is looked at again in float64, for sums that nearly cancel.
_DOUBTFUL = 1e-5
# Above this the written adapter is not the merge that was asked for; float32 factors reach about 1e-6.
FAILED = 1e-3


def probes_of(width: int, seed: int) -> Probes:
    """Directions of a module's input, each entry 1 or -1 by a hash: (k, width).

    Whatever E is, |E x|^2 is its squared Frobenius norm on average over such x; NumPy's own generators take longer to import
    than small merges need.
    """
    digest = hashlib.shake_256(str(seed_of(seed, "probes", width)).encode()).digest(-(-_PROBES * width // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=_PROBES * width)
    return (bits.astype(np.float32) * 2 - 1).reshape(_PROBES, width)


def probes_by_width(widths: Iterable[int], seed: int) -> dict[int, Probes]:
    """Width of an input -> directions that all modules of that width share."""
    return {width: probes_of(width, seed) for width in set(widths)}


def stored_sum(parts: Sequence[Part], dtype: str) -> tuple[LoraFactors, LoraFactors]:
    """Put factors beside each other, in float32 and as they are stored.

    Args:
        parts: At least one; all of one (out, in).
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        The sum in float32, and rounded to the type: one and the same where that is float32. The bits are those of
        `plait.adapters.lora.concatenated`.
    """
    B = rounded(np.concatenate([_scaled(f, c).data for c, f in parts], axis=1), FLOAT32)
    exact = LoraFactors(stacked(parts, dtype), B, 1.0, parts[0][1].kind)  # type: ignore[arg-type]
    return exact, (exact if dtype == FLOAT32 else in_type(exact, dtype))


def stacked(parts: Sequence[Part], dtype: str) -> Array:
    """Put A of every part one under another: as they are where all are of a type, else in float32."""
    stacked = [array_of(f.A) for _, f in parts]
    if all(a.dtype.name == dtype for a in stacked):
        return Array(np.concatenate([a.data for a in stacked]), stacked[0].dtype)
    return rounded(np.concatenate([floats(a) for a in stacked]), FLOAT32)


def in_type(factors: LoraFactors, dtype: str) -> LoraFactors:
    """Factors of scaling 1 in a type, each number rounded; as they are where they are of it."""
    A, B = (
        a if a.dtype.name == dtype else rounded(floats(a), dtype) for a in (array_of(factors.A), array_of(factors.B))
    )
    return LoraFactors(A, B, 1.0, factors.kind)  # type: ignore[arg-type]


def _scaled(factors: LoraFactors, c: float) -> Array:
    """B times what multiplies an input, in float32."""
    return rounded(_times(floats(array_of(factors.B)), c * factors.scaling), FLOAT32)


def _times(numbers: Floats, factor: float) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is for the caller to see
        result: Floats = numbers if factor == 1.0 else numbers * np.float32(factor)
    return result


def rounding(exact: LoraFactors, stored: LoraFactors, probes: Probes) -> tuple[float, float]:
    """What rounding took from one module, |(D' - D) X|^2, and |D X|^2.

    Args:
        exact: Its factors in float32 (A as it is, where rounding leaves it so), scaling 1.
        stored: The same, rounded.
        probes: X, transposed.
    """
    inner = times_rows(probes, array_of(exact.A))
    wanted = times_rows(inner, array_of(exact.B))
    if stored.A is not exact.A:
        inner = times_rows(probes, array_of(stored.A))
    off = times_rows(inner, array_of(stored.B)) - wanted
    return float(np.vdot(off, off)), float(np.vdot(wanted, wanted))


def taken(parts: Iterable[tuple[float, float]]) -> float:
    """The relative error of a whole model from what `rounding` says of its modules."""
    errors, sizes = zip(*parts, strict=True)
    return float((sum(errors) / sum(sizes)) ** 0.5) if sum(sizes) > 0 else 0.0


def sum_error(parts: Sequence[Part], merged: LoraFactors, probes: Probes) -> float:
    """The relative difference between D X and sum_t c_t D_t X, from the factors as they were read; nothing is held.

    A result that is bit for bit its inputs' factors beside each other is that sum, whatever X is, and takes no product.
    Where the result is of 16 bits, each summand is rounded as it was to be: what is compared is then not the rounding, which
    has a figure of its own, but all the rest.

    Args:
        parts: Coefficient (the scale included) and factors of each input.
        merged: The result, not cut to a lower rank.
        probes: X, transposed.
    """
    if is_beside(parts, merged):
        return 0.0
    dtype = array_of(merged.B).dtype.name if merged.scaling == 1.0 else FLOAT32
    error = 1.0
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is an error, and is told as one
        for kind in (np.float32, np.float64):
            wanted = sum(_applied(f, probes, kind, c, dtype) for c, f in parts)
            result = _applied(merged, probes, kind)
            size = float(np.linalg.norm(wanted))
            if size == 0 or not result.any():
                return 0.0 if size == float(np.linalg.norm(result)) else 1.0
            error = float(np.linalg.norm(wanted - result)) / size
            if error <= _DOUBTFUL:
                break
    return error


def is_beside(parts: Sequence[Part], merged: LoraFactors) -> bool:
    """Whether a result is A of every input, one under another, and its B times its coefficient, one beside another, bit for bit."""
    A, B = array_of(merged.A), array_of(merged.B)
    dtype = B.dtype.name
    if merged.scaling != 1.0 or A.dtype.name != dtype or merged.rank != sum(f.rank for _, f in parts):
        return False
    start = 0
    for _, f in parts:
        own = array_of(f.A)
        own = own if own.dtype.name == dtype else rounded(floats(own), dtype)
        if not _same_bits(A.data[start : start + f.rank], own.data):
            return False
        start += f.rank
    together = max(1, _TOGETHER // max(1, B.shape[1]))
    rows = rows_in(parts, dtype, min(together, len(B.data)))
    for i in range(0, len(B.data), together):
        j = min(len(B.data), i + together)
        if not _same_bits(B.data[i:j], rows(i, j)):
            return False
    return True


def _same_bits(data: Floats, wanted: Any) -> bool:
    numbers = f"u{data.itemsize}"
    return data.shape == wanted.shape and bool((data.view(numbers) == wanted.view(numbers)).all())


def _applied(
    factors: LoraFactors,
    probes: Probes,
    kind: Any,
    weight: float = 1.0,
    dtype: str = "",
) -> Floats:
    """(D X)^T in a type; rounded on the way as a sum of another type rounds it."""
    A, B = array_of(factors.A), array_of(factors.B)
    factor = weight * factors.scaling
    if dtype in (BFLOAT16, FLOAT16):
        A = A if A.dtype.name == dtype else rounded(floats(A), dtype)
        B = B if B.dtype.name == dtype and factor == 1.0 else rounded(_times(floats(B), factor), dtype)
        factor = 1.0
    inner = times_rows(probes.astype(kind, copy=False), A)
    return times_rows(inner if factor == 1.0 else inner * kind(factor), B)


def times_rows(X: Floats, M: Array) -> Floats:
    """X M^T in the type of X, for X (k, m) and M (n, m), in pieces that OpenBLAS multiplies in the calling thread.

    Products as thin as these are no faster on more cores, and its threads spin while they wait: beside our own, and on a busy
    machine, they took several times as long as everything else.
    """
    result: Floats = np.empty((len(X), len(M.data)), X.dtype)
    for start, stop in pieces(X, len(M.data)):
        result[:, start:stop] = product(X, floats(Array(M.data[start:stop], M.dtype), X.dtype))
    return result


def product(X: Floats, M: Floats) -> Floats:
    """X M^T of one piece."""
    short: Floats = (M @ np.ascontiguousarray(X.T)).T if X.shape[1] <= _NARROW else X @ M.T
    return short


def pieces(X: Floats, count: int) -> Iterator[tuple[int, int]]:
    """Give ranges of so many rows by which X is multiplied together."""
    rows = max(1, _ALONE // max(1, X.size))
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def require_verified(error: float, method: str) -> None:
    """Refuse a written merge that is not the one that was asked for.

    Raises:
        RunError: The error is larger than rounding in float32 makes any.
    """
    if not error <= FAILED:
        raise RunError(
            f"the written adapter differs from the merge of its inputs by {error:.2g}",
            where=method,
            hint="nothing was written; please report this",
        )
