"""Links of a folder from somebody else: those that lead out of it would carry a file of this machine into a result."""

from __future__ import annotations

from pathlib import Path

from plait.disk.hub import snapshot_of
from plait.errors import InputError


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder lies elsewhere, by a link of its own or of a folder in between.

    In the hub's cache a snapshot is made of links into its repository, which count as inside.

    Args:
        path: A file below the folder.
        folder: The folder; that it is a link itself does not matter.
    """
    root = folder.resolve()
    repository = root.parent.parent if snapshot_of(root) else root
    return not path.resolve().is_relative_to(repository)


def require_inside(path: Path, folder: Path, what: str) -> None:
    """Refuse a file that a link leads to from outside a folder.

    Args:
        path: A file below the folder.
        folder: The folder.
        what: What would become of the file's content, as the end of a sentence.

    Raises:
        InputError: It lies elsewhere.
    """
    if leads_out(path, folder):
        raise InputError(
            f"a link to a file outside its folder, whose content {what}",
            where=str(path),
            hint="remove it, or put a copy of the file in its place if that is what you mean",
        )
