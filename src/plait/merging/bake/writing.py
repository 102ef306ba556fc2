"""The files of a base: copied and hashed in one go, deltas added to their rows, and what stands there then held against W x + D x."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.tensor_file import begin_writing_out, set_aside
from plait.disk.files import HASHED_BYTES_AT_ONCE
from plait.errors import RunError
from plait.merging.bake.sites import Site
from plait.merging.dense import row_blocks
from plait.model.stored import StoredTensor
from plait.seeds import seed_of

_PROBES = 2


@dataclass(frozen=True, slots=True)
class Added:
    """What became of one weight.

    Args:
        error, size: Squared norms of what rounding took, and of the delta.
        off: |W' x - (W x + D x)| / |W x + D x|; 0 where nobody looked.
    """

    error: float
    size: float
    off: float = 0.0


def copied(path: Path, target: Path, holes: Sequence[tuple[int, int]] = ()) -> str:
    """Copy a file; its SHA-256, of the bytes that were read.

    Args:
        path: The file.
        target: Its copy.
        holes: Ranges of bytes that are left out, in their order: what is written over need not be written twice.
    """
    digest, piece, place = hashlib.sha256(), memoryview(bytearray(HASHED_BYTES_AT_ONCE)), 0
    with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
        set_aside(out.fileno(), path.stat().st_size)
        while count := source.readinto(piece):
            for start, stop in _outside(place, place + count, holes):
                rest = piece[start - place : stop - place]
                out.seek(start)
                while rest.nbytes:
                    rest = rest[out.write(rest) or 0 :]
                begin_writing_out(out.fileno(), start, stop)
            digest.update(piece[:count])
            place += count
        out.truncate(place)
    return digest.hexdigest()


def _outside(start: int, stop: int, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a range that lie in none of some others."""
    for first, last in holes:
        if last > start and first < stop:
            if first > start:
                yield start, first
            start = last
    if start < stop:
        yield start, stop


def add_to_files(
    pairs: Sequence[tuple[Site, StoredTensor]], each: Callable[..., list[Any]], *, verify: bool
) -> list[Added]:
    """Add deltas to weights in copies of the base's files.

    Each delta is formed once: while its rows are in the cache they are added, rounded, and multiplied with the directions on
    which the written files are compared once all weights are there.

    Args:
        pairs: Where each delta goes, and the tensor of the copy that takes it.
        each: Calls a function with each item of a list, side by side; no two weights share a byte.
        verify: Whether the files are read again.

    Raises:
        RunError: A sum that the type does not hold, or a file that is not base + delta.
    """
    done: list[tuple[Added, Tensor]] = each(lambda pair: _write(*pair, verify=verify), pairs)
    if not verify:
        return [added for added, _ in done]
    checked = [(site, target, wanted) for (site, target), (_, wanted) in zip(pairs, done, strict=True)]
    errors: list[float] = each(lambda one: _off(*one), checked)
    return [replace(added, off=off) for (added, _), off in zip(done, errors, strict=True)]


def _wide(stored: StoredTensor) -> torch.dtype:
    """The type in which sums are formed: one that holds a product of the weight's own and has digits to spare.

    Of 16 bit weights it is float32: converted to them, a sum in float64 is rounded to float32 first, and gives the same bits.
    """
    return torch.float32 if stored.torch_dtype.itemsize == 2 else torch.float64


def _blocks(site: Site) -> list[tuple[int, int]]:
    """Rows of a weight as it is stored that are changed together."""
    return [(0, site.stored.shape[0])] if site.transposed else list(row_blocks(site.delta.shape))


class _Buffers:
    """Memory for a block of rows as they are stored, and in the type of the sums.

    One for all blocks of a weight: new pages cost as much as the adding.
    """

    def __init__(self, site: Site) -> None:
        start, stop = _blocks(site)[0]
        self._stored = torch.empty(stop - start, site.stored.shape[1], dtype=site.stored.torch_dtype)
        self._wide = torch.empty(self._stored.shape, dtype=_wide(site.stored))

    def read(self, source: StoredTensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of a file, as they are stored and wide."""
        stored, wide = self._stored[: stop - start], self._wide[: stop - start]
        source.read_into(start, stored)
        return stored, wide.copy_(stored)


def _probe(site: Site) -> Tensor:
    """Directions, one a row: BLAS multiplies few rows with a matrix twice as fast as a matrix with few columns."""
    generator = torch.Generator().manual_seed(seed_of("bake", site.tensor))
    probe = torch.randn(site.stored.shape[1], _PROBES, dtype=torch.float64, generator=generator)
    return probe.to(_wide(site.stored)).T.contiguous()


def _write(site: Site, target: StoredTensor, *, verify: bool) -> tuple[Added, Tensor]:
    """Add the delta to the copy's rows; what that took, and W x + D x."""
    error = size = 0.0
    wide, probe, buffers = _wide(site.stored), _probe(site), _Buffers(site)
    wanted: list[Tensor] = []
    factors = None if site.transposed else site.delta.factors
    for start, stop in _blocks(site):
        written, exact = buffers.read(site.stored, start, stop)
        if factors and verify:
            wanted.append(probe @ exact.T)
        if factors and wide == factors.A.dtype and factors.A.device.type == "cpu":
            # One product that adds to what is there: its own memory would be written and read three times more.
            exact.addmm_(factors.B[start:stop], factors.A, alpha=factors.scaling)
        else:
            more = (site.delta.dense().T if site.transposed else site.delta.rows(start, stop)).to(wide)
            if not factors and verify:
                wanted.append(probe @ exact.T + probe @ more.T)
            exact += more
            size += 0.0 if factors else _squares(more)
        written.copy_(exact)  # rounds
        target.write(start, written)
        error += _squares(exact.sub_(written))  # not finite where the type does not hold the sum
        if not math.isfinite(error):
            raise RunError(f"base + delta overflows {written.dtype}", where=site.tensor)
    if factors:
        size = max(0.0, factors.norm_squared())
    if not verify:
        return Added(error, size), torch.empty(0, dtype=wide)
    whole = torch.cat(wanted, dim=1)
    if factors:  # D x through them takes a hundredth of the time
        whole += (probe @ factors.A.cpu().to(wide).T) @ factors.B.cpu().to(wide).T * factors.scaling
    return Added(error, size), whole


def _squares(numbers: Tensor) -> float:
    """The sum of their squares, in one pass."""
    flat = numbers.reshape(-1)
    return float(torch.dot(flat, flat))


def _off(site: Site, target: StoredTensor, wanted: Tensor) -> float:
    """The relative difference between W' x, read from the written file, and W x + D x."""
    probe, buffers = _probe(site), _Buffers(site)
    found = torch.cat([probe @ buffers.read(target, start, stop)[1].T for start, stop in _blocks(site)], dim=1)
    error = float((found - wanted).double().norm() / wanted.double().norm().clamp(min=1e-300))
    if not error <= 4 * torch.finfo(site.stored.torch_dtype).eps:
        raise RunError(
            f"written weights differ from base + delta by {error:.2g}", where=site.tensor, hint="nothing was kept"
        )
    return error
