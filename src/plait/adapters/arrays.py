"""Tensors without torch: what a file holds as NumPy arrays, for work that is read, add, write. Importing torch takes longer than that.

An `Array` answers what the readers ask of a torch tensor under the same names, so that both take one way through them. NumPy has
no bfloat16: its numbers are kept as their 16 bits, the upper half of a float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from plait.adapters.header import ITEMSIZES, TORCH_NAMES
from plait.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Floats: TypeAlias = "NDArray[Any]"  # float32 or float64
BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"
# Rounding takes about 0.2 % of an update in bfloat16, 0.03 % in float16; above this share it is not the merge that was asked for.
_MOST_TAKEN = 0.5
KEEP = "keep"  # what is asked for where a result has the type of its inputs
# Of the types with which NumPy computes, the bytes of one number: the name in a file's header, and the one that torch has for it.
_STORED = {"F64": "float64", "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
_ITEMSIZES = {name: ITEMSIZES[code] for code, name in TORCH_NAMES.items()}
_LOOKED_UP = 1 << 15  # numbers of float16 from which a table of all of them is worth making
_HELD: dict[str, type[np.generic]] = {
    "float64": np.float64, FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: np.uint16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of an array's numbers, by torch's name."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _ITEMSIZES[self.name]


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """Numbers of a float type.

    Args:
        data: As they are stored; of bfloat16 the bits.
        dtype: Their type.
    """

    data: NDArray[Any]
    dtype: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.data.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return self.data.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.data.itemsize

    def numel(self) -> int:
        """How many numbers there are."""
        return self.data.size

    def is_floating_point(self) -> bool:
        """Whether the numbers are floats, which all arrays' are."""
        return True

    def view(self, *shape: int) -> Array:
        """Refuse: what is taken apart is taken apart by torch."""
        raise NoArrayError("a view")

    def reshape(self, *shape: int) -> Array:
        """The same numbers in another shape."""
        return Array(self.data.reshape(*shape), self.dtype)


class NoArrayError(Exception):
    """What only torch holds: a tensor of 8 bit floats, of integers."""


def stored_array(buffer: Any, start: int, dtype: str, shape: Sequence[int]) -> Array:
    """The numbers of one entry of a safetensors file, not copied where they are aligned.

    Args:
        buffer: What holds its bytes.
        start: Where they begin.
        dtype: As the header has it, such as "BF16".
        shape: As the header has it.

    Raises:
        NoArrayError: Another type.
    """
    if (name := _STORED.get(dtype)) is None:
        raise NoArrayError(dtype)
    data: NDArray[Any] = np.frombuffer(buffer, dtype=_HELD[name], count=math.prod(shape), offset=start)
    return Array((data if data.flags.aligned else data.copy()).reshape(shape), Kind(name))


def shape_of(shape: tuple[int, ...], name: str) -> Array:
    """A shape and a type in the place of numbers that are to come."""
    return Array(np.broadcast_to(np.zeros((), _HELD[name]), shape), Kind(name))


def zeros(shape: tuple[int, ...]) -> Array:
    """Zeros in float32."""
    return Array(np.zeros(shape, np.float32), Kind(FLOAT32))


def array_of(tensor: Tensor | Array) -> Array:
    """A tensor on the CPU as an array of the same memory; an array as it is."""
    if isinstance(tensor, Array):
        return tensor
    import torch

    plain = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    bits = plain.view(torch.int16).numpy().view(np.uint16) if name == BFLOAT16 else plain.numpy()
    return Array(bits, Kind(name))


def floats(array: Array, kind: Any = np.float32) -> Floats:
    """The numbers in float32 or float64, which hold those of 16 bits exactly; not copied where they are of that type."""
    if array.dtype.name == BFLOAT16:
        bits = array.data.astype(np.uint32)
        bits <<= np.uint32(16)
        wide: Floats = bits.view(np.float32)
        return wide.astype(kind, copy=False)
    if array.dtype.name == FLOAT16 and array.data.size > _LOOKED_UP:
        return halves().take(array.data.view(np.uint16).astype(np.intp), mode="clip").astype(kind, copy=False)
    return array.data.astype(kind, copy=False)


@functools.cache
def halves() -> Floats:
    """Every number of float16, by its bits, in float32: looked up it takes half the time of NumPy's conversion."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def rounded(numbers: Floats, name: str) -> Array:
    """Float32 numbers rounded to a type, halves to even, as torch rounds them; what is too large becomes infinity.

    Args:
        numbers: Of any shape.
        name: "float32", "float16" or "bfloat16".
    """
    plain = np.ascontiguousarray(numbers, np.float32)
    if name == BFLOAT16:
        bits = plain.view(np.uint32)
        up = bits >> np.uint32(16)
        up &= np.uint32(1)
        up += np.uint32(0x7FFF)
        up += bits
        up >>= np.uint32(16)
        return Array(up.astype(np.uint16), Kind(name))
    with np.errstate(over="ignore"):
        return Array(plain.astype(_HELD[name], copy=False), Kind(name))


def all_finite(array: Array) -> bool:
    """Whether there is neither NaN nor infinity: of 16 bits, by the largest on either side of zero; else a finite sum proves it cheaply."""
    if array.dtype.name in (BFLOAT16, FLOAT16):
        infinity = 0x7F80 if array.dtype.name == BFLOAT16 else 0x7C00
        if not array.data.size:
            return True
        # As integers magnitudes keep their order: with a sign positive numbers are the largest, without one negative numbers are.
        largest, most_negative = int(array.data.view(np.int16).max()), int(array.data.view(np.uint16).max())
        return largest < infinity and most_negative < infinity + 0x8000
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(array.data.sum())) or bool(np.isfinite(array.data).all())


def product_norm_squared(A: Array, B: Array) -> float:
    """Squared Frobenius norm of B A, for A (r, in) and B (out, r), from their (r, r) Gram matrices in float64."""
    wide_A, wide_B = floats(A, np.float64), floats(B, np.float64)
    return float(((wide_B.T @ wide_B) * (wide_A @ wide_A.T)).sum())


def widened(tensor: Tensor) -> Tensor:
    """An 8 bit float as float32, which holds each of its values exactly and with which torch can compute; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def equal(one: Tensor | Array, other: Tensor | Array) -> bool:
    """Whether shapes and numbers are the same, as `torch.equal` has it."""
    if isinstance(one, Array) and isinstance(other, Array):
        return one.shape == other.shape and np.array_equal(floats(one, np.float64), floats(other, np.float64))
    import torch

    return torch.equal(one, other)  # type: ignore[arg-type]


def require_left(dtype: str, error: float, where: str | None = None) -> None:
    """Refuse a type in which hardly anything is left of an update: its numbers became 0, or cancel.

    Args:
        dtype: The type.
        error: What rounding to it took of the update.
        where: Whose update it is.

    Raises:
        RunError: More than half is gone.
    """
    if error > _MOST_TAKEN:
        raise RunError(
            f"rounding to {dtype} takes {100 * error:.0f} % of the update", where=where, hint="--dtype float32"
        )
