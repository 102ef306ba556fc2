"""Which versions a result was made by."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

from plait.version import __version__


@functools.cache
def versions() -> dict[str, str]:
    """Versions of plait and of what it computes with, for the record."""
    installed = _installed()
    found = {"plait": __version__}
    for name in ("torch", "transformers", "peft", "safetensors", "numpy"):
        if name in installed:
            found[name] = installed[name]
    return found


def _installed() -> dict[str, str]:
    """Package -> its version, by the names of the folders that installers leave: importing importlib.metadata takes ten times as long."""
    found: dict[str, str] = {}
    for place in map(Path, sys.path):
        with contextlib.suppress(OSError):
            for entry in (path.name for path in place.iterdir()):
                name, _, version = entry.removesuffix(".dist-info").partition("-")
                if entry.endswith(".dist-info") and version:
                    found.setdefault(name.lower(), version)
    return found
