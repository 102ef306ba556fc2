"""Full disks at random offsets: ``PYTHONPATH=src:. python -P -m benchmarks.trust.disks --to FOLDER --count 100``.

A command writes to a small tmpfs of which a random part of what it needs is free; where nothing may be mounted, a limit on
the size of each file (RLIMIT_FSIZE) takes its place, and the rows say so. Held: exit code 4 and one line that says it (or 0,
where it went in), the old result untouched and nothing half written under the result's name, no litter but the checkpoints
of a training; and once there is room, the same command ends in the bytes of an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.trust import Row, row, undisturbed, write_part
from benchmarks.trust.kills import Reference, inputs, prepared, reference, resumed
from benchmarks.trust.small import COMMANDS, PLACE, Command, contents, ended, litter, warm, worlds

_PAGE = 4096
_ROOM = 4 << 20
_FILLER = ".filler"


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        return _mounted(Path(folder), _ROOM) and _unmounted(Path(folder))


def _mounted(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def _unmounted(folder: Path) -> bool:
    return subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(world: Path, free: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A copy of a world on a disk of its own with so many bytes free, and a function that makes room there."""
    with tempfile.TemporaryDirectory(prefix=PLACE) as folder:
        disk = Path(folder)
        if not _mounted(disk, _ROOM + sum(-(-len(d) // _PAGE) * _PAGE for d in contents(world).values())):
            raise RuntimeError("nothing may be mounted here")
        try:
            shutil.copytree(world, disk, dirs_exist_ok=True)
            filler = disk / _FILLER
            with filler.open("wb") as file:
                here = os.statvfs(disk)
                file.write(bytes(max(0, here.f_bavail * here.f_frsize - free)))
            yield disk, filler.unlink
        finally:
            _unmounted(disk)


def filled(command: Command, world: Path, free: int, whole: Reference, mount: bool) -> tuple[bool, str]:
    """Run a command with so many bytes free: whether it met the full disk, and what fell."""
    if not mount:
        return _judged(
            command, world, whole, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (free, free)), lambda: None
        )
    with small_disk(world, free) as (disk, make_room):
        return _judged(command, disk, whole, None, make_room)


def _judged(
    command: Command, world: Path, whole: Reference, limit: Callable[[], None] | None, make_room: Callable[[], None]
) -> tuple[bool, str]:
    before, old = _inputs(command, world), contents(world / command.out) if (world / command.out).exists() else {}
    code, said = ended(command.args, world, limit)
    there = contents(world / command.out) if (world / command.out).exists() else {}
    resumable = command.name in ("train", "run", "study run")
    left = [name for name in litter(world) if not (resumable and (".checkpoints" in name or name.endswith(".files")))]
    if code not in (0, 4) or "Traceback" in said:
        fell = f"exit code {code}: {said.strip()[-200:]}"
    elif code == 4 and not any(word in said for word in ("space", "limit on file sizes")):
        fell = f"its line does not say what to do: {said.strip()[-200:]}"
    elif code == 4 and command.name not in ("run", "study run") and there != old:
        fell = "half a result is left, or the old one is gone"
    elif left:
        fell = f"litter: {', '.join(left[:3])}"
    else:
        make_room()
        fell = resumed(command, world, before, whole)
    return code != 0, fell


def _inputs(command: Command, world: Path) -> dict[str, bytes]:
    return {n: d for n, d in inputs(command, world).items() if n != _FILLER}


def campaign(command: Command, fresh: Callable[[], Path], count: int, rng: random.Random, mount: bool) -> Row:
    """Fill the disk under a command `count` times, each in a fresh world."""
    whole = reference(command, fresh)
    sizes = [len(d) for d in whole.files.values()]
    need = sum(-(-s // _PAGE) * _PAGE for s in sizes) if mount else max(sizes)
    outcomes, met = [], 0
    for _ in range(count):
        free = rng.randrange(0, need // _PAGE + 1) * _PAGE if mount else rng.randrange(0, need)
        full, fell = filled(command, prepared(command, fresh), free, whole, mount)
        met += full
        outcomes.append(f"{free} bytes free: {fell}" if fell else "")
    how = "a full disk" if mount else "a limit on the size of files"
    held = "exit code 4 and one line, nothing half written, the same bytes once there is room"
    what = f"plait {command.name}, {how} at a random offset: {held}"
    return row(what, outcomes, [f"{met} of {count} met it"])


def main() -> None:
    """Run and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[n for n in COMMANDS if n not in ("run", "study run")])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warm()
    mount, rng, rows = can_mount(), random.Random(given.seed), []
    with worlds() as fresh:
        for i, name in enumerate(given.only):
            count = given.count // len(given.only) + (i < given.count % len(given.only))
            attack = partial(campaign, COMMANDS[name], fresh, count, rng, mount)
            rows.append(undisturbed(name, attack, lambda r: r))
            print(f"{name}: tried {rows[-1].tried}, fell {rows[-1].fell} {rows[-1].notes}", file=sys.stderr, flush=True)
            write_part(given.to, "disks", rows, " ".join(["python -P -m benchmarks.trust.disks", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
