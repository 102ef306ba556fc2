"""Who may write an output or read an input, and what the operating system says when it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from plait.disk.durable import absent_above, make_above, remove_empty
from plait.errors import EnvironmentFault, InputError, PlaitError

STEPS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a writable --out",
    errno.EACCES: "choose a writable --out",
    errno.EPERM: "choose a writable --out",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENAMETOOLONG: "choose a shorter --out",
    errno.ELOOP: "a symbolic link points to itself",
    errno.EFBIG: "a limit on file sizes is set",
    errno.EIO: "the disk failed",
    errno.ENOMEM: "a larger machine, or free some memory",
}


def require_readable(path: Path) -> None:
    """Refuse a file that may not be read and a folder that may not be entered; what is not there is not looked at.

    Raises:
        InputError: Its rights are another user's. safetensors' own writer leaves files that only their owner may read.
    """
    try:
        rights = os.R_OK | (os.X_OK if path.is_dir() else 0)
        shut = path.exists() and not os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)
    except PermissionError:  # a folder above may not be entered
        shut = True
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
            raise
        raise InputError("no such file: its name is none", where=str(path), hint="check the path") from None
    if shut:
        raise InputError("may not be read by this user", where=str(path), hint="its owner can: chmod -R a+rX FOLDER")


@contextlib.contextmanager
def locked(path: Path, *, output: Path | None = None, doing: str = "") -> Iterator[None]:
    """Hold an output: two processes on one destination is an error, not a race. The lock dies with its holder.

    Args:
        path: What is held.
        output: What a person calls it, where `path` is a folder of plait's own beside that.
        doing: What is done meanwhile, such as "plait merge auto": whoever comes second is told.

    Raises:
        EnvironmentFault: Another process holds it, or its folder cannot be written.
    """
    lock, named = path.absolute().parent / f".{path.absolute().name}.lock", str(output or path)
    with contextlib.ExitStack() as held:
        with system_errors(output or path):
            made = absent_above(lock)
            held.callback(remove_empty, made)  # of a run that was refused before it wrote anything
            try:
                make_above(lock)
                file = held.enter_context(lock.open("a+", encoding="utf-8"))
            except FileNotFoundError:  # /proc and the like, or a folder removed meanwhile
                raise EnvironmentFault(
                    "cannot write: nothing can be made there", where=named, hint="choose a writable --out"
                ) from None
            ours = _seize(file.fileno(), lock)
            if ours:
                file.truncate(0)
                file.write(doing)
                file.flush()
        if not ours:
            what = (
                f"another process is making it: {said}" if (said := _holder(lock)) else "another process is writing it"
            )
            raise EnvironmentFault(what, where=named, hint="wait for it, or choose another --out")
        held.callback(lock.unlink, missing_ok=True)
        yield


def _holder(lock: Path) -> str:
    """What the holder of a lock says that it does; "" where it says nothing."""
    try:
        with lock.open(encoding="utf-8", errors="replace") as file:
            return file.read(80).strip()
    except OSError:  # let go of just now
        return ""


def _seize(descriptor: int, lock: Path) -> bool:
    """Whether the lock is ours now: seized, and still the file that others will find."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == lock.stat().st_ino
    except (BlockingIOError, FileNotFoundError):  # held, or just let go and unlinked by its holder
        return False


def shut_from(path: Path) -> InputError | None:
    """Why a path may not be read by this user, where its rights or those of a folder above it are the reason."""
    try:
        for place in (*reversed(path.absolute().parents), path):
            require_readable(place)
    except InputError as e:
        return e
    return None


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Have the system's errors of writing into a folder that is not staged name it, where they name no file."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno in STEPS:
            e.filename = str(path)
        raise


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a full, read-only or misnamed place into an `EnvironmentFault`."""
    try:
        yield
    except PlaitError:
        raise
    except OSError as e:
        if e.errno not in STEPS:
            raise
        raise EnvironmentFault(f"cannot write: {e.strerror}", where=str(path), hint=STEPS[e.errno]) from e
