"""One file of a base: copied and hashed in one go, deltas added to its rows, and what stands there then held against W x + D x."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.disk.files import HASHED_BYTES_AT_ONCE
from plait.errors import RunError
from plait.merging.bake_sites import Site
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


def copied(path: Path, target: Path) -> str:
    """Copy a file; its SHA-256, of the bytes that were copied."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(HASHED_BYTES_AT_ONCE))
    with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
        while count := source.readinto(piece):
            rest = piece[:count]
            while rest.nbytes:
                rest = rest[out.write(rest) or 0 :]
            digest.update(piece[:count])
    return digest.hexdigest()


def add_to_file(pairs: Sequence[tuple[Site, StoredTensor]], *, verify: bool) -> list[Added]:
    """Add deltas to weights that lie in one file.

    Each delta is formed once: while its rows are in the cache they are added, rounded, and multiplied with the directions on
    which the written file is compared once all its weights are there.

    Args:
        pairs: Where each delta goes, and the tensor of the copy that takes it.
        verify: Whether the file is read again.

    Raises:
        RunError: A sum that the type does not hold, or a file that is not base + delta.
    """
    done = [_write(site, target, verify=verify) for site, target in pairs]
    if not verify:
        return [added for added, _ in done]
    checked = zip(pairs, done, strict=True)
    return [Added(added.error, added.size, _off(site, target, wanted)) for (site, target), (added, wanted) in checked]


def _wide(stored: StoredTensor) -> torch.dtype:
    """The type in which sums are formed: one that holds a product of the weight's own and has digits to spare.

    Of 16 bit weights it is float32: converted to them, a sum in float64 is rounded to float32 first, and gives the same bits.
    """
    return torch.float32 if stored.torch_dtype.itemsize == 2 else torch.float64


def _rows(site: Site) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, the base's rows, delta rows) of a weight as it is stored."""
    if site.transposed:
        yield 0, site.stored.read(0, site.stored.shape[0]), site.delta.dense().T
    else:
        for start, stop in row_blocks(site.delta.shape):
            yield start, site.stored.read(start, stop), site.delta.rows(start, stop)


def _probe(site: Site) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of("bake", site.tensor))
    probe = torch.randn(site.stored.shape[1], _PROBES, dtype=torch.float64, generator=generator)
    return probe.to(_wide(site.stored))


def _write(site: Site, target: StoredTensor, *, verify: bool) -> tuple[Added, Tensor]:
    """Add the delta to the copy's rows; what that took, and W x + D x."""
    error = size = 0.0
    wide, probe = _wide(site.stored), _probe(site)
    wanted: list[Tensor] = []
    for start, stored, delta in _rows(site):
        base, more = stored.to(wide), delta.to(wide)
        if verify:
            wanted.append(base @ probe + more @ probe)
        exact = base + more
        written = exact.to(stored.dtype)
        target.write(start, written)
        error += float(exact.sub_(written).square_().sum())  # not finite where the type does not hold the sum
        size += float(more.square().sum())
        if not math.isfinite(error):
            raise RunError(f"base + delta overflows {site.stored.dtype}", where=site.tensor)
    return Added(error, size), torch.cat(wanted) if wanted else torch.empty(0, dtype=wide)


def _off(site: Site, target: StoredTensor, wanted: Tensor) -> float:
    """The relative difference between W' x, read from the written file, and W x + D x."""
    probe, wide = _probe(site), _wide(site.stored)
    blocks = [(0, target.shape[0])] if site.transposed else list(row_blocks(site.delta.shape))
    found = torch.cat([target.read(start, stop).to(wide) @ probe for start, stop in blocks])
    error = float((found - wanted).double().norm() / wanted.double().norm().clamp(min=1e-300))
    if not error <= 4 * torch.finfo(site.stored.torch_dtype).eps:
        raise RunError(
            f"written weights differ from base + delta by {error:.2g}", where=site.tensor, hint="nothing was kept"
        )
    return error
