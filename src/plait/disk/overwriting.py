"""What `--overwrite` may replace: results that plait wrote, and nothing that this command reads or stands in."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plait.disk.files import sha256_file
from plait.disk.manifest import CARD, CARD_HASH, MANIFEST, read_manifest
from plait.errors import Damaged, InputError, UsageError

_HINT = "choose another --out, or remove it yourself"
_MARKS = (b'"manifest_sha256"', b'"versions"', b'"inputs"', b'"stage"')  # of a manifest, some of which outlive damage


def require_replaceable(path: Path, *, unit: bool = False) -> None:
    """Refuse to replace what is not a folder that plait wrote, whole or damaged since; nothing and an empty folder pass.

    Args:
        path: What stands where a folder is to be written.
        unit: Whether it is a place inside a run or a study, which plait named itself: there a folder whose manifest
            is gone, or damaged beyond recognition, is replaced too.

    Raises:
        UsageError: A link, a file, a device, a folder of somebody else's or with somebody else's files in it, one whose card
            was edited, or the working directory or a folder above it. Says which.
    """
    _require_not_above(path)
    mode = _mode(path)
    if mode is None or (stat.S_ISDIR(mode) and not any(path.iterdir())):
        return
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{_kind(mode)} stands there, not a folder of plait's", where=str(path), hint=_HINT)
    if not unit and not _is_ours(path):
        raise UsageError("holds no manifest of plait's, so it is not replaced", where=str(path), hint=_HINT)
    if not unit and _is_card_edited(path):
        raise UsageError(
            f"its {CARD} was edited since plait wrote it, so it is not replaced",
            where=str(path),
            hint=f"move {CARD} away first, or choose another --out",
        )
    if foreign := _foreign(path):
        raise UsageError(
            f"holds {foreign!r}, which plait did not write, so it is not replaced", where=str(path), hint=_HINT
        )


def require_replaceable_file(path: Path, ours: Callable[[Path], bool] | None) -> None:
    """Refuse to replace what is not a file that plait wrote.

    Args:
        path: What stands where a file is to be written.
        ours: Whether a regular file is one that this command writes; None where its place is plait's own.

    Raises:
        UsageError: A link, a folder, a device, or another file.
    """
    mode = _mode(path)
    if mode is None:
        return
    if not stat.S_ISREG(mode):
        raise UsageError(f"{_kind(mode)} stands there, not a file of plait's", where=str(path), hint=_HINT)
    try:
        known = ours is None or path.stat().st_size == 0 or ours(path)
    except InputError:
        known = False
    if not known:
        raise UsageError("was not written by this command, so it is not replaced", where=str(path), hint=_HINT)


def require_place(path: Path, ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Refuse a place for a file before what goes there is computed: minutes of work are not lost to what stands there.

    Args:
        path: Where the file is to be written.
        ours: Whether a regular file is one that this command writes.
        overwrite: Whether such a file is to be replaced.

    Raises:
        UsageError: Something stands there that is not to be replaced.
    """
    if _mode(path) is not None and not overwrite:
        raise UsageError("exists", where=str(path), hint="choose another --out, or --overwrite")
    require_replaceable_file(path, ours)


def require_apart(out: Path, inputs: Iterable[Path | str]) -> None:
    """Refuse an output that is, holds, or lies inside something that the command reads, or inside another result.

    Args:
        out: Where the result goes; links and relative paths are followed.
        inputs: Files and folders that are read; what does not exist is passed over.

    Raises:
        UsageError: Names the input, or the result that would hold a file that it does not list.
    """
    place = out.resolve()
    read = [Path(given) for given in inputs if str(given)]
    _require_outside(place, out, read)
    for path in read:
        if not path.exists():
            continue
        real = path.resolve()
        if place == real or (out.exists() and path.samefile(out)):
            raise UsageError("is an input of this command", where=str(out), hint="choose another --out")
        if place in real.parents:
            raise UsageError(f"holds {path}, an input of this command", where=str(out), hint="choose another --out")


def _require_outside(place: Path, out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place inside a finished result: its manifest lists every file, and this one would make it a damaged one."""
    if (around := next((p for p in place.parents if (p / MANIFEST).is_file()), None)) is None:
        return
    read = next((path for path in inputs if path.exists() and path.resolve() == around), None)
    what = f"{read}, an input of this command" if read else f"{around}, another result"
    raise UsageError(
        f"lies inside {what}, which would not be whole any more", where=str(out), hint="choose another --out"
    )


def _require_not_above(path: Path) -> None:
    here, place = Path.cwd().resolve(), path.resolve()
    if place == here or place in here.parents:
        raise UsageError("is the working directory or a folder above it", where=str(path), hint="choose another --out")


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or socket")


def _is_ours(folder: Path) -> bool:
    """Whether a folder has a manifest of plait's, also one that was damaged."""
    try:
        found = read_manifest(folder)
        return found is not None and "stage" in found
    except Damaged:
        with (folder / MANIFEST).open("rb") as file:
            start = file.read(1 << 20)
        return sum(mark in start for mark in _MARKS) >= 2
    except InputError:  # of another schema, so of another version
        return True


def _foreign(folder: Path) -> str:
    """A file in a folder of plait's that its manifest does not list, also a hidden one; "" where there is none."""
    try:
        listed = (read_manifest(folder) or {}).get("files")
    except InputError:
        return ""  # what it lists cannot be known any more
    if listed is None:
        return ""
    for place, _, files in os.walk(folder):
        for file in files:
            name = (Path(place) / file).relative_to(folder).as_posix()
            if name not in listed and name not in (MANIFEST, CARD):
                return name
    return ""


def _is_card_edited(folder: Path) -> bool:
    """Whether the card is not the one that the manifest knows; of a manifest that knows of none, nobody can tell."""
    try:
        written = (read_manifest(folder) or {}).get(CARD_HASH)
    except InputError:
        return False
    card = folder / CARD
    return written is not None and card.is_file() and sha256_file(card) != written
