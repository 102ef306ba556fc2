"""Whether what is to be written has room, looked at before it is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

from plait.errors import EnvironmentFault

_MB = 1e6


def in_units(size: float) -> str:
    """Write a number of bytes as a person reads it.

    >>> in_units(1_234_567_890), in_units(65_400_000), in_units(300)
    ('1.2 GB', '65.4 MB', '1 kB')
    """
    if size >= 1000 * _MB:
        return f"{size / _MB / 1000:,.1f} GB"
    return f"{size / _MB:.1f} MB" if size >= _MB else f"{max(1.0, 1000 * size / _MB):.0f} kB"


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
