"""Whether what is to be written has room, looked at before it is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

from plait.errors import EnvironmentFault

_MB = 1e6


def require_space(path: Path, size: int) -> None:
    """Refuse to begin what will not fit on the disk.

    Args:
        path: Where the result goes; need not exist.
        size: Bytes that it will take, as far as is known beforehand.

    Raises:
        EnvironmentFault: Fewer are free; says both numbers. Space that another process fills meanwhile is met when it is
            written.
    """
    place = next((p for p in (path.absolute(), *path.absolute().parents) if p.is_dir()), None)
    if place is None:
        return
    try:
        free = shutil.disk_usage(place).free
    except OSError:  # a file system that does not tell
        return
    if free < size:
        raise EnvironmentFault(
            f"{size / _MB:,.1f} MB are to be written, {free / _MB:,.1f} MB are free",
            where=str(path),
            hint="free some space, or choose another --out",
        )
