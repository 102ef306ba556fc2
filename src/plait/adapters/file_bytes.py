"""A safetensors file as bytes in memory, its header held against them; what makes tensors of them comes after."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from plait.adapters.arrays import Array, all_finite, stored_array
from plait.adapters.hashing import PIECE, Digest, Hashing, Pieces
from plait.adapters.header import ADVICE, read_header
from plait.adapters.memory import available_memory, let_go, own_block
from plait.disk.files import require_regular
from plait.errors import EnvironmentFault, InputError

_LARGE = 1 << 26  # below, nobody asks how much memory there is
Check = Callable[[Mapping[str, tuple[int, ...]]], None]


@dataclass(frozen=True, slots=True)
class FileBytes:
    """What a file holds.

    Args:
        entries: Name -> what the header says of it.
        metadata: The header's texts.
        buffer: Memory of our own, or the file's own pages.
        start, stop: Where in it the data lie.
        digest: Waits for the hash of the whole file; "" where none was wanted.
    """

    entries: dict[str, Any]
    metadata: dict[str, str]
    buffer: mmap.mmap
    start: int
    stop: int
    digest: Digest


def begin_bytes(path: Path, hashing: Hashing | None, check: Check | None = None) -> FileBytes:
    """Read or map a file; arguments and errors as `plait.adapters.tensors.begin_tensors` has them."""
    require_regular(path)
    with path.open("rb", buffering=0) as f:
        before = os.fstat(f.fileno())
        entries, head = read_header(f, path, before.st_size)
        if check:
            check({name: tuple(entry["shape"]) for name, entry in entries.items()})
        digest: Digest = str
        size, start = before.st_size - len(head), 0
        if hashing:
            pieces = hashing.pieces()
            pieces.update(head)
            block = _memory_for(size, path)
            whole, digest = _filled(f, memoryview(block)[:size], pieces), pieces.digest
        else:  # copied where somebody changes them
            block, start, whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), len(head), True
    metadata = _metadata(path)
    after = path.stat()
    changed = (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns)
    if changed or not whole:
        raise InputError("changed while it was read", where=str(path), hint="try again when nothing writes it")
    return FileBytes(entries, metadata, block, start, start + size, digest)


def read_layout(path: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """A safetensors file's metadata, what its header says of each tensor, and where the data begin; no tensor is read.

    Raises:
        InputError: As in `plait.adapters.tensors.read_tensors`.
    """
    require_regular(path)
    with path.open("rb", buffering=0) as f:
        entries, head = read_header(f, path, path.stat().st_size)
    return _metadata(path), entries, len(head)


def _metadata(path: Path) -> dict[str, str]:
    try:  # the library checks the layout: every offset, no overlap, no hole
        with safe_open(path, framework="numpy") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as e:
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=ADVICE) from None


def begin_arrays(
    path: Path, hashing: Hashing | None, *, finite: bool = False, check: Check | None = None
) -> tuple[dict[str, Array], dict[str, str], Digest]:
    """As `plait.adapters.tensors.begin_tensors`, without torch.

    Raises:
        NoArrayError: A tensor of a type that NumPy does not compute with.
    """
    found = begin_bytes(path, hashing, check)
    order = sorted(found.entries.items(), key=lambda item: item[1]["data_offsets"])
    arrays: dict[str, Array] = {}
    for name, entry in order:
        place = found.start + entry["data_offsets"][0]
        array = arrays[name] = stored_array(found.buffer, place, entry["dtype"], entry["shape"])
        if finite and not all_finite(array):
            raise InputError(f"tensor {name!r} holds NaN or infinity", where=str(path))
        if finite and hashing is None:  # what is mapped need not stay in memory until it is asked for
            let_go(array)
    return arrays, found.metadata, found.digest


def _memory_for(size: int, path: Path) -> mmap.mmap:
    """Memory for a file's data.

    Raises:
        EnvironmentFault: There is less.
    """
    shortage = EnvironmentFault(
        f"{size / 1e9:.3g} GB of tensors are more than the memory that is free",
        where=str(path),
        hint="a larger machine, or free some memory",
    )
    if size > _LARGE and (free := available_memory()) is not None and size > free:
        raise shortage
    try:
        return own_block(size)
    except (MemoryError, OverflowError, OSError) as e:
        raise shortage from e


def _filled(f: FileIO, rest: memoryview, pieces: Pieces) -> bool:
    """Read as many bytes as the buffer holds, each piece hashed while the next is read; whether there were that many, no more."""
    while rest.nbytes and (count := f.readinto(rest[:PIECE])):
        pieces.update(rest[:count])
        rest = rest[count:]
    return not rest.nbytes and not f.read(1)
