"""What a file's header says of its tensors, without their numbers: enough for everything that is told of an adapter but lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.arrays import Kind
from plait.adapters.file_bytes import Check, read_layout
from plait.adapters.header import TORCH_NAMES
from plait.adapters.weights import INDEX, WEIGHTS, shards
from plait.border.checked import shown
from plait.errors import InputError

if TYPE_CHECKING:
    from plait.adapters.hashing import Digest, Hashing


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor without numbers: it answers what readers ask of one before they compute.

    Args:
        shape: Length of each dimension.
        dtype: Type of the numbers that are not here.
    """

    shape: tuple[int, ...]
    dtype: Kind

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return self.numel() * self.itemsize

    def numel(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether the numbers are floats."""
        return self.dtype.name.startswith(("float", "bfloat"))

    def float(self) -> Shape:
        """The shape of the same numbers in float32."""
        return Shape(self.shape, Kind("float32"))

    def view(self, *shape: int) -> Shape:
        """The shape of the same numbers in other dimensions, of which one may be -1."""
        known = math.prod(n for n in shape if n >= 0)
        return Shape(tuple(n if n >= 0 else self.numel() // max(1, known) for n in shape), self.dtype)

    reshape = view

    def permute(self, *order: int) -> Shape:
        """The shape with its dimensions in another order."""
        return Shape(tuple(self.shape[i] for i in order), self.dtype)

    def contiguous(self) -> Shape:
        """The same shape."""
        return self

    def __getitem__(self, place: int) -> Shape:
        return Shape(self.shape[1:], self.dtype)


def read_shapes(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """A file's tensors without their numbers, in file order, and its metadata.

    Raises:
        InputError: As `plait.adapters.tensors.read_tensors`, or a type that is not read.
    """
    metadata, entries, _ = read_layout(path)
    return {name: _shape(name, entry, path) for name, entry in entries.items()}, metadata


def begin_shapes(
    path: Path, hashing: Hashing | None, *, finite: bool = False, check: Check | None = None
) -> tuple[dict[str, Shape], dict[str, str], Digest]:
    """As `plait.adapters.tensors.begin_tensors`, of the header alone: nothing is hashed, and no number looked at."""
    shapes, metadata = read_shapes(path)
    if check:
        check({name: shape.shape for name, shape in shapes.items()})
    return shapes, metadata, str


def weight_shapes(folder: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """A PEFT folder's tensors without their numbers, and their metadata; none where it has no weights."""
    if (folder / WEIGHTS).exists():
        return read_shapes(folder / WEIGHTS)
    files = shards(folder) if (folder / INDEX).exists() else []
    return {name: shape for file in files for name, shape in read_shapes(folder / file)[0].items()}, {}


def _shape(name: str, entry: Mapping[str, Any], path: Path) -> Shape:
    if entry["dtype"] not in TORCH_NAMES:
        raise InputError(f"tensor {name!r} is of type {shown(entry['dtype'])}, which is not read", where=str(path))
    return Shape(tuple(entry["shape"]), Kind(TORCH_NAMES[entry["dtype"]]))
