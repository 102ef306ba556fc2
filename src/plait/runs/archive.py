"""A finished run as one file to publish: every answer that was given and what it is scored against; no adapters, no texts."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.disk.store import staged_file
from plait.errors import UsageError
from plait.runs.folder import FILES, RECIPE_FILE, published
from plait.runs.inputs import INPUTS_FILE
from plait.runs.journal import JOURNAL
from plait.runs.layout import Layout
from plait.runs.units import REPAIR, STATISTICS, TRAIN
from plait.runs.waves import all_units

SUFFIX = ".tar.xz"


@dataclass(frozen=True, slots=True)
class Archived:
    """A run in one file.

    Args:
        archive: The file.
        units: How many results it holds.
        bytes: Its size.
    """

    archive: str
    units: int
    bytes: int


def write_archive(layout: Layout, to: Path, *, base: str = "", data: str = "", overwrite: bool = False) -> Archived:
    """Write what the tables of a finished study need, so that anybody can compute them again.

    Unpacked it is a folder of the study's name that `plait study table` takes, and that `plait study run` goes on from.
    Folders of whoever ran it are left out. The same study gives the same bytes.

    Args:
        layout: Of the study.
        to: The file, ``*.tar.xz``.
        base: What its base is called there; by default its hub name, or ``./`` and the last name of its folder.
        data: What its data's folder is called there; by default as for the base.
        overwrite: Replace it where it is there.

    Raises:
        RunError: The study is not finished.
        UsageError: Another suffix, or the file is there.
    """
    if not to.name.endswith(SUFFIX):
        raise UsageError(f"an archive is called *{SUFFIX}", where=str(to))
    paths = sorted({p for p in _results(layout) if p.is_dir()})
    with staged_file(to, overwrite=overwrite, ours=_is_archive) as stage, tarfile.open(stage, "w:xz") as tar:
        _add(tar, f"{layout.recipe.name}/{RECIPE_FILE}", _told(layout, base, data).encode())
        for name in (INPUTS_FILE, JOURNAL):
            if (layout.out / name).is_file():
                _add(tar, f"{layout.recipe.name}/{name}", (layout.out / name).read_bytes())
        for path in paths:
            for file in sorted(p for p in path.iterdir() if p.is_file()):
                _add(tar, f"{layout.recipe.name}/{path.relative_to(layout.out)}/{file.name}", file.read_bytes())
    return Archived(str(to), len(paths), to.stat().st_size)


def _is_archive(path: Path) -> bool:
    """Whether a file is an archive as `write_archive` begins one."""
    try:
        with tarfile.open(path, "r:xz") as tar:
            first = tar.next()
    except (tarfile.TarError, lzma.LZMAError, EOFError):
        return False
    return first is not None and first.name.endswith(tuple(f"/{name}" for name in FILES))


def _results(layout: Layout) -> Iterator[Path]:
    """Folders of what is scored or measured; what was only needed to get there stays behind."""
    for unit in all_units(layout):
        if unit.stage not in (STATISTICS, TRAIN, REPAIR):
            yield layout.of(unit).path(unit)


def _told(layout: Layout, base: str, data: str) -> str:
    """The study, its folders by their published names."""
    told = layout.recipe.model_dump(mode="json")
    told["base"]["model"] = base or published(told["base"]["model"])
    told["data"]["root"] = data or published(told["data"]["root"])
    return json.dumps(told, indent=1) + "\n"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
