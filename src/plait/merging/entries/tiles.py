"""Products of factors block by block, in memory that is used again: on a CPU a block and all that is made of it stay in a core's cache."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from plait.merging.dense import entries_together, row_blocks, rows_together

# Rows of a block that need not hold whole rows. BLAS packs the right factor anew for every block, of as many columns as the block
# has: 64 rows of 512 columns take half the time of 8 rows of 4096. More rows gain nothing.
_ROWS = 64
# Most tasks whose blocks are made, and looked at, by one call: all of them stay in a core's cache until they are used.
TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [top, bottom) and columns [left, right) of a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.bottom - self.top, self.right - self.left


def tiles(
    shape: tuple[int, int], device: torch.device, *, whole_rows: bool, start: int = 0, stop: int | None = None
) -> Iterator[Tile]:
    """Cover rows [start, stop) of a matrix by tiles of as many entries as are computed together.

    On a CPU they lie within the blocks of rows for which random draws are made (`dense.BLOCK`), and where they begin depends on the
    shape alone.

    Args:
        shape: (rows, columns) of the matrix.
        device: Where it is computed.
        whole_rows: Whether every tile has all columns; always so on a GPU.
        start: First row to cover.
        stop: Row before which to end; by default after the last.
    """
    stop = shape[0] if stop is None else stop
    together = entries_together(device)
    if device.type != "cpu":
        yield from (Tile(i + start, j + start, 0, shape[1]) for i, j in row_blocks((stop - start, shape[1]), together))
        return
    for first, last in row_blocks(shape):
        if first >= stop or last <= start:
            continue
        rows = rows_together(shape[1], together) if whole_rows else min(_ROWS, last - first)
        columns = max(1, shape[1] if whole_rows else together // rows)
        for top in range(first, last, rows):
            for left in range(0, shape[1], columns):
                tile = Tile(max(start, top), min(stop, top + rows, last), left, min(left + columns, shape[1]))
                if tile.top < tile.bottom:
                    yield tile


@dataclass(frozen=True, slots=True)
class Spare:
    """Tensors that are filled again for every block: new memory costs more than the arithmetic on it.

    Of one thread. What it gives is valid until it is asked for the same name and shape again.

    Args:
        held: (name, shape, dtype, device) -> tensor; blocks have few shapes.
    """

    held: dict[Hashable, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor."""
        key = (name, shape, dtype, device)
        tensor = self.held.get(key)
        if tensor is None:
            tensor = self.held[key] = torch.empty(shape, dtype=dtype, device=device)
        return tensor

    def like(self, name: str, part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of another's shape and device, and of its dtype by default."""
        return self.tensor(name, part.shape, dtype or part.dtype, part.device)


@dataclass(frozen=True, slots=True)
class Products:
    """Per task the product of two factors, a part of a space, given tile by tile.

    Args:
        lefts: Per task (n, r_t).
        rights: Per task (r_t, m).
        stacked: All of both in one tensor each, where that is faster: on a CPU, of tasks of equal ranks.
    """

    lefts: Sequence[Float[Tensor, "n r"]]
    rights: Sequence[Float[Tensor, "r m"]]
    stacked: tuple[Float[Tensor, "T n r"], Float[Tensor, "T r m"]] | None

    @classmethod
    def of(cls, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Products:
        """From the factors of at least one task."""
        alike = {left.shape[1] for left in lefts} == {max(1, lefts[0].shape[1])}
        alike = alike and lefts[0].device.type == "cpu"
        return cls(lefts, rights, (torch.stack(list(lefts)), torch.stack(list(rights))) if alike else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.lefts[0].shape[0], self.rights[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.lefts[0].device

    def tiles(self, *, whole_rows: bool, start: int = 0, stop: int | None = None) -> Iterator[Tile]:
        """Tiles of these products; see `tiles`."""
        return tiles(self.shape, self.device, whole_rows=whole_rows, start=start, stop=stop)

    def few(self) -> Iterator[Products]:
        """The products of as many tasks as are computed together, and of those that follow: their entries are the same to the bit."""
        for first in range(0, len(self.lefts), TOGETHER):
            those = slice(first, first + TOGETHER)
            stacked = None if self.stacked is None else (self.stacked[0][those], self.stacked[1][those])
            yield Products(self.lefts[those], self.rights[those], stacked)

    def parts(self, tile: Tile, spare: Spare) -> Iterator[Float[Tensor, "rows columns"]]:
        """One tile of every task, each free to be changed in place, and all of them valid until the next tile.

        On a GPU, which has memory enough but not for all tasks at once, each is made when it is its turn.
        """
        for _, group in self.groups(tile, spare, apart=True):
            yield from group

    def groups(
        self, tile: Tile, spare: Spare, *, apart: bool = False
    ) -> Iterator[tuple[int, Float[Tensor, "k rows columns"]]]:
        """(first task, one tile of it and of those that follow) of as many tasks as are computed together.

        The entries are those of `parts`, to the bit. On a GPU every task is alone.

        Args:
            tile: Its place.
            spare: Memory of the groups, which may be changed in place.
            apart: Whether a group stays valid until the next tile, and not only until the next group.
        """
        rows, columns = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        if self.device.type != "cpu":
            for task, (left, right) in enumerate(zip(self.lefts, self.rights, strict=True)):
                yield task, (left[rows] @ right[:, columns])[None]
            return
        like, count = self.lefts[0], len(self.lefts)
        for first in range(0, count, TOGETHER):
            those = slice(first, min(first + TOGETHER, count))
            name = f"parts{first}" if apart else "parts"
            out = spare.tensor(name, (those.stop - first, *tile.shape), like.dtype, like.device)
            if self.stacked is not None:
                left, right = self.stacked
                torch.bmm(left[those, rows], right[those, :, columns], out=out)
            else:
                for left, right, part in zip(self.lefts[those], self.rights[those], out, strict=True):
                    torch.mm(left[rows], right[:, columns], out=part)
            yield first, out
