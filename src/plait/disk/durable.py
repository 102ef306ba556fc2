"""Flushing to the disk in the order that a power loss needs: files, then the folders that name them, from the inside out."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # what file systems say that flush no folders


def flush_file(path: Path) -> None:
    """Have a file's bytes on the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def flush_folder(path: Path) -> None:
    """Have a folder's entries on the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def flush_folders(root: Path) -> None:
    """Have the entries of a folder and of all folders in it on the disk, the inner ones first."""
    for place, _, _ in os.walk(root, topdown=False):
        flush_folder(Path(place))


def absent_above(path: Path) -> list[Path]:
    """List the folders above a path that are not there yet, the innermost first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def make_above(path: Path) -> None:
    """Make the folders above a path, each with its entry on the disk: what is flushed in them would go with them else."""
    made = absent_above(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    for folder in made:
        flush_folder(folder.parent)


def remove_empty(made: list[Path]) -> None:
    """Remove folders that were made, the innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def flush_above(path: Path, made: list[Path]) -> None:
    """Have a path's own entry on the disk, and those of the folders above it that were made for it."""
    for folder in dict.fromkeys([path.parent, *(m.parent for m in made)]):
        flush_folder(folder)
