"""SHA-256 beside the work: one thread hashes what another reads or writes."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PIECE = 1 << 20  # bytes that are hashed while the next are read; threads wait for Python's lock once a piece
_THREADS = 2
RANGE = 1 << 22  # bytes of a written file that are hashed at once: a multiple of a page, wherever we run

Digest = Callable[[], str]  # waits until the hash is there


class Hashing:
    """Threads that hash what they are handed, each file's bytes in their order, while the one that hands them over goes on.

    Two serve all the files of a merge, in turns: their hashes together take longer than all reading and checking, so that the
    one that reads soon waits for them; a thread for each file would only take that time from the others.
    """

    def __init__(self) -> None:
        self._threads = [ThreadPoolExecutor(1) for _ in range(_THREADS)]
        self._next = cycle(self._threads)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def pieces(self) -> Pieces:
        """The hash of what is handed over piece by piece."""
        return Pieces(next(self._next).submit)

    def later(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have something hashed as a whole by the next thread; what waits for it, and raises what it met."""
        return next(self._next).submit(work).result

    def file(self, path: Path) -> WrittenFile:
        """The hash of a file that is being written."""
        return WrittenFile(path, self.pieces())


class Pieces:
    """The hash of pieces in their order; each must stay as it is until the hash is asked for."""

    def __init__(self, submit: Callable[..., Future[Any]]) -> None:
        self._submit, self._running = submit, hashlib.sha256()
        self._pending: list[Future[Any]] = []

    def update(self, piece: bytes | memoryview) -> None:
        """Hash these bytes next."""
        self._pending.append(self._submit(self._running.update, piece))

    def update_from(self, path: Path, start: int, stop: int) -> None:
        """Hash these bytes of a file next, which are looked up when it is their turn; `start` is a multiple of `RANGE`."""
        self._pending.append(self._submit(self._read, path, start, stop))

    def _read(self, path: Path, start: int, stop: int) -> None:
        # Mapped, so that a whole range is hashed without Python's lock, which the thread that writes has need of.
        with path.open("rb") as f, mmap.mmap(f.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start) as pages:
            self._running.update(pages)

    def digest(self) -> str:
        """The hash of all pieces so far, in hexadecimal digits; waits for it, and raises what the thread met."""
        for done in self._pending:
            done.result()
        return self._running.hexdigest()


class WrittenFile:
    """The hash of a file that is written in any order, from any thread: whatever lies without a gap from its start is hashed."""

    def __init__(self, path: Path, pieces: Pieces) -> None:
        self._path, self._pieces = path, pieces
        self._lock = threading.Lock()
        self._ends: dict[int, int] = {}  # of what was written behind a gap, by its start
        self._whole = self._given = 0

    def wrote(self, start: int, stop: int) -> None:
        """These bytes, one at least, are in the file now and stay as they are."""
        with self._lock:
            self._ends[start] = stop
            while self._whole in self._ends:
                self._whole = self._ends.pop(self._whole)
            if self._whole - self._given >= RANGE:
                self._hand_over(self._whole // RANGE * RANGE)

    def _hand_over(self, stop: int) -> None:
        if stop > self._given:  # nothing is no range of a file
            self._pieces.update_from(self._path, self._given, stop)
            self._given = stop

    def whole(self) -> Digest:
        """To be called when the whole file is written: what waits for its hash."""
        with self._lock:
            self._hand_over(self._whole)
        return self._pieces.digest
