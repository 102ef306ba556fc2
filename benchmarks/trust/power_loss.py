"""The disk as POSIX promises it: what was done in a folder step by step, and what a power loss may leave of any beginning.

The model is the weakest file system that POSIX allows: a file's bytes are on the disk once the file was flushed, a folder's
entries once the folder was, each entry apart from all others, and nothing else is promised. Entries of one folder that one
call changes, as a rename does, change together.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0


@dataclass(frozen=True, slots=True)
class Data:
    """A file holds other bytes from here on."""

    file: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Entries:
    """A folder's entries change: name -> file or folder, None where the name goes."""

    folder: int
    changes: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """All that was done to a file or folder until here is on the disk."""

    node: int


@dataclass
class Record:
    """A folder as it was, and everything that a command did in it, in order.

    Nodes are files (bytes) and folders (name -> node), numbered; the folder itself is `ROOT`.
    """

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    steps: list[Data | Entries | Flush] = field(default_factory=list)


Tree = dict[str, bytes | None]  # path -> content; None for a folder


def snapshot(folder: Path) -> Record:
    """A record of a folder as it is, on the disk, with no steps yet."""
    record = Record()
    count = ROOT

    def enter(place: Path, node: int) -> None:
        nonlocal count
        for entry in sorted(place.iterdir()):
            count += 1
            record.folders[node][entry.name] = here = count
            if entry.is_dir() and not entry.is_symlink():
                record.folders[here] = {}
                enter(entry, here)
            else:
                record.files[here] = entry.read_bytes()

    enter(folder, ROOT)
    return record


def tree_of(folder: Path) -> Tree:
    """Everything below a folder."""
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


WAYS = ("kept", "dropped", "entries kept, data dropped", "data kept, entries dropped")


def after(record: Record, cut: int, way: str, rng: random.Random | None = None) -> Tree:
    """What is on the disk if the power goes after so many steps.

    Args:
        record: What was done.
        cut: The number of steps that were done.
        way: One of `WAYS` for what was not flushed; or "some": each change kept or not, each file whole, cut, of zeros, or
            as it was flushed last, by `rng`.
        rng: For "some".
    """
    flushed = {step.node: i for i, step in enumerate(record.steps[:cut]) if isinstance(step, Flush)}
    files = dict(record.files)
    folders = {n: dict(entries) for n, entries in record.folders.items()}
    for i, step in enumerate(record.steps[:cut]):
        if isinstance(step, Data):
            if i < flushed.get(step.file, -1) or way in ("kept", "data kept, entries dropped"):
                files[step.file] = step.content
            elif way == "some" and rng is not None:
                files[step.file] = _torn(files[step.file], step.content, rng)
        elif isinstance(step, Entries):
            certain = i < flushed.get(step.folder, -1) or way in ("kept", "entries kept, data dropped")
            if certain or (way == "some" and rng is not None and rng.random() < 0.5):
                for name, node in step.changes:
                    folders[step.folder].pop(name, None)
                    if node is not None:
                        folders[step.folder][name] = node
    return dict(_walk(files, folders, ROOT, ""))


FLUSHES = ("files", "folders inside", "the folder around")


def without(record: Record, kind: str) -> Record:
    """A record as if a command had left out its flushes of one kind (in `FLUSHES`): what a replay has to fall on."""
    kinds = {
        "files": lambda node: node in record.files,
        "folders inside": lambda node: node in record.folders and node != ROOT,
        "the folder around": lambda node: node == ROOT,
    }
    steps = [s for s in record.steps if not (isinstance(s, Flush) and kinds[kind](s.node))]
    return Record(record.files, record.folders, steps)


def _torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    return rng.choice((old, new, bytes(len(new)), new[: rng.randint(0, len(new))]))


def _walk(
    files: dict[int, bytes], folders: dict[int, dict[str, int]], node: int, path: str
) -> Iterator[tuple[str, bytes | None]]:
    for name, inner in folders[node].items():
        here = f"{path}{name}"
        if inner in folders:
            yield here, None
            yield from _walk(files, folders, inner, f"{here}/")
        else:
            yield here, files[inner]


def lay(tree: Tree, folder: Path) -> None:
    """Write a state into a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
