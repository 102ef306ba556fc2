"""A safetensors file as bytes in memory, its header held against them; what makes tensors of them comes after."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

_HELD = 1 << 25  # bytes of mapped files that are used before their pages are given back
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


class Mapped:
    """Files whose own pages are used while something is made of them, in the place of memory that holds all they say.

    Nobody may write them meanwhile, which is looked at when they are hashed and once more by `require_unchanged`.
    """

    def __init__(self) -> None:
        self._files: list[tuple[Path, mmap.mmap, _Stamp]] = []
        self._passed = 0

    def add(self, path: Path, pages: mmap.mmap, stamp: _Stamp) -> None:
        """Remember a file as it was when it was mapped."""
        self._files.append((path, pages, stamp))

    def let_go(self) -> None:
        """Have the system take back the pages; whoever reads on finds them again in its cache of the disk."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for _, pages, _ in self._files:
                pages.madvise(mmap.MADV_DONTNEED)

    def passed(self, nbytes: int) -> None:
        """Take note that so many bytes were used, for now; once they are many, let go of all."""
        self._passed += nbytes
        if self._passed > _HELD:
            self._passed = 0
            self.let_go()

    def require_unchanged(self) -> None:
        """Refuse what was made of files that somebody wrote meanwhile.

        Raises:
            InputError: One is not the file that was hashed.
        """
        for path, _, stamp in self._files:
            _require_same(path, stamp)


_Stamp = tuple[int, int, int]  # inode, bytes, time of the last change


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _require_same(path: Path, stamp: _Stamp) -> None:
    if not path.exists() or _stamp(path.stat()) != stamp:
        raise InputError("changed while it was read", where=str(path), hint="try again when nothing writes it")


def begin_bytes(
    path: Path, hashing: Hashing | None, check: Check | None = None, mapped: Mapped | None = None
) -> FileBytes:
    """Read or map a file; arguments and errors as `begin_arrays` has them."""
    require_regular(path)
    with path.open("rb", buffering=0) as f:
        before = os.fstat(f.fileno())
        entries, head = read_header(f, path, before.st_size)
        if check:
            check({name: tuple(entry["shape"]) for name, entry in entries.items()})
        digest: Digest = str
        size, start = before.st_size - len(head), 0
        if hashing and mapped is None:
            pieces = hashing.pieces()
            pieces.update(head)
            block = _memory_for(size, path)
            whole, digest = _filled(f, memoryview(block)[:size], pieces), pieces.digest
        else:  # copied where somebody changes them
            block, start, whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), len(head), True
    metadata, stamp = _metadata(path), _stamp(before)
    _require_same(path, stamp if whole else (0, 0, 0))
    if mapped is not None:
        mapped.add(path, block, stamp)
        digest = hashing.later(partial(_hash_of, path, stamp)) if hashing else digest
    return FileBytes(entries, metadata, block, start, start + size, digest)


def _hash_of(path: Path, stamp: _Stamp) -> str:
    """The hash of the file that was mapped: through a small buffer, since every page of a mapping costs a fault."""
    _require_same(path, stamp)
    with path.open("rb", buffering=0) as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    _require_same(path, stamp)
    return digest


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
    path: Path,
    hashing: Hashing | None,
    *,
    finite: bool = False,
    check: Check | None = None,
    mapped: Mapped | None = None,
) -> tuple[dict[str, Array], dict[str, str], Digest]:
    """As `plait.adapters.tensors.begin_tensors`, without torch.

    `mapped` keeps the file, which is then mapped though it is hashed.

    Raises:
        NoArrayError: A tensor of a type that NumPy does not compute with.
    """
    found = begin_bytes(path, hashing, check, mapped)
    order = sorted(found.entries.items(), key=lambda item: item[1]["data_offsets"])
    arrays: dict[str, Array] = {}
    for name, entry in order:
        place = found.start + entry["data_offsets"][0]
        array = arrays[name] = stored_array(found.buffer, place, entry["dtype"], entry["shape"])
        if finite and not all_finite(array):
            raise InputError(f"tensor {name!r} holds NaN or infinity", where=str(path))
        if mapped:  # what is mapped need not stay in memory until it is asked for
            mapped.passed(array.nbytes if finite else 0)
        elif finite and hashing is None:
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
