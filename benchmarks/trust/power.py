"""Power losses replayed: ``PYTHONPATH=src:. python -P -m benchmarks.trust.power --to FOLDER``; needs strace.

One run of each command is recorded (every write, flush, rename and entry). For every beginning of the record all states that
`power_loss.WAYS` names are laid out in fresh folders, and `--random` states more in which each change that was not flushed
is there or not by chance. Held: every reader finds the result that was there before, or the new one, or says what is wrong,
the old result still lies there wherever the new one does not, and the new one does once the command has ended. As a control
the records are replayed without their flushes, of files, of folders inside the result and of the one around it: that has to fall.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from benchmarks.trust import Row, row, undisturbed, write_part
from benchmarks.trust.power_loss import FLUSHES, WAYS, Record, Tree, after, lay, without
from benchmarks.trust.recording import recorded
from benchmarks.trust.small import (
    COMMANDS,
    PLACE,
    RESUMED,
    TELL_TIME,
    Command,
    comparable,
    contents,
    ended,
    require_done,
    warm,
    worlds,
)

from plait.checking.check import check_path
from plait.disk.manifest import MANIFEST, read_manifest
from plait.disk.store import is_done
from plait.errors import PlaitError
from plait.formats.reading import read_any
from plait.statistics.files import is_statistics, read_statistics

Files = Mapping[str, bytes]
Judge = Callable[[Path, Files, Files], str]


def states(record: Record, chance: int, seed: int) -> Iterator[tuple[str, Tree]]:
    """Every distinct state that a power loss may leave: where it was cut and what was kept, and the state."""
    seen, rng = set(), random.Random(seed)
    for cut in range(len(record.steps) + 1):
        for way in (*WAYS, *["some"] * chance):
            tree = after(record, cut, way, rng)
            parts = [
                f"{name!r} {content is None} {hashlib.sha256(content or b'').hexdigest()}"
                for name, content in sorted(tree.items())
            ]
            key = hashlib.sha256("\n".join(parts).encode()).digest()
            if key not in seen:
                seen.add(key)
                yield f"after step {cut} of {len(record.steps)}, {way}", tree


def verdict(place: Path, old: Files, new: Files) -> str:
    """What is wrong with a state; "" where it is the old result, the new one, or is refused with the old one still there."""
    aside = place.parent / f".{place.name}.replaced"
    there = contents(place) if place.exists() else {}
    if there == new:
        return (
            ""
            if any(_accepts(read, place, new) for read in READERS.values())
            else "the new result is refused by every reader"
        )
    kept = not old or there == old or (aside.exists() and contents(aside) == old)
    if not kept:
        return "neither the old result nor the new one is there"
    if not there or there == old:
        return ""
    accepting = [name for name, read in READERS.items() if _accepts(read, place, new)]
    return f"half a result is accepted by {', '.join(accepting)}" if accepting else ""


def verdict_of_units(place: Path, old: Files, new: Files) -> str:
    """What is wrong with a state of a run or a study, whose units come one by one: each is gone, whole or refused.

    The command that is run again does what is gone or refused, and reuses the rest.
    """
    for unit in sorted({str(PurePosixPath(n).parent) for n in new if PurePosixPath(n).name == MANIFEST}):
        prefix = "" if unit == "." else f"{unit}/"
        whole = {n.removeprefix(prefix): d for n, d in new.items() if n.startswith(prefix)}
        there = contents(place / unit) if (place / unit).exists() else {}
        if there and there != whole and _accepts(_done, place / unit, whole):
            return f"half a unit is taken for done: {unit}"
    for name in [n for n in new if n.endswith(".stats.safetensors") and (place / n).is_file()]:
        if (place / name).read_bytes() != new[name] and _accepts(_read, place / name, new):
            return f"half a file is read: {name}"
    return ""


def verdict_of_text(place: Path, old: Files, new: Files) -> str:
    """What is wrong with a state of a page, a recipe or a table: each is the old one, the new one, or not there."""
    there = contents(place) if place.exists() else {}
    return "" if there in (old, new) else "half a text is there"


def _unlocked(files: Files) -> Files:
    """Without what a power loss may bring back of a finished unit, whose removal nobody flushes: empty locks, interim parts."""
    return {n: d for n, d in files.items() if not any(part.startswith(".") for part in PurePosixPath(n).parts)}


def lasting(record: Record, name: str, new: Files) -> str:
    """What is wrong if the power goes once the command has ended; "" where its whole result is on the disk."""
    tree, prefix = after(record, len(record.steps), "dropped"), f"{name}/"
    there = {n.removeprefix(prefix): c for n, c in tree.items() if n.startswith(prefix) and c is not None}
    if isinstance(alone := tree.get(name), bytes):
        there = {"": alone}
    return "" if _unlocked(there) == new else "not on the disk though the command had ended"


def control(record: Record, kind: str, name: str, old: Files, new: Files, scratch: Path, judge: Judge = verdict) -> str:
    """A record without its flushes of one kind, replayed: "" where that falls, as it has to."""
    shorter = without(record, kind)
    if lasting(shorter, name, new):
        return ""
    for _, tree in states(shorter, 1, 0):
        lay(tree, scratch)
        if judge(scratch / name, old, new):
            return ""
    return f"nobody notices that flushes of {kind} are left out"


def _accepts(read: object, place: Path, new: Files) -> bool:
    try:
        return bool(read(place, new))  # type: ignore[operator]
    except PlaitError:
        return False


def _check(place: Path, new: Files) -> bool:
    return not any(c.failed for c in check_path(place))


def _read(place: Path, new: Files) -> bool:
    return bool(read_statistics(place) if place.is_file() and is_statistics(place) else read_any(place))


def _done(place: Path, new: Files) -> bool:
    """Whether a command that wants this result takes it for done."""
    if "plait.json" not in new:
        return False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plait.json").write_bytes(new["plait.json"])
        wanted = read_manifest(Path(folder)) or {}
    return is_done(place, {k: wanted[k] for k in ("schema", "stage", "options", "inputs", "seed")}, read=True)


READERS = {"plait check": _check, "the reader": _read, "is_done": _done}


def lost(command: Command, world: Path, scratch: Path, chance: int, again: int, seed: int = 0) -> tuple[Row, Row]:
    """Record a command in a world, and judge every state a power loss may leave; then the same without its flushes.

    Args:
        command: What is recorded.
        world: Its inputs; holds the new result afterwards.
        scratch: For the states.
        chance: Random states for each beginning.
        again: In how many of the states the command is run again, which must end in the new result.
        seed: Of the random states.
    """
    if command.before:
        require_done(command.before, world)
    old = contents(world / command.out)
    record, code = recorded(command.args, world, scratch.parent / "strace.log")
    if code:
        raise RuntimeError(f"plait {command.name}: exit code {code}")
    new = contents(world / command.out)
    judge = verdict_of_units if command.name in RESUMED else verdict
    if command.is_text:
        judge = verdict_of_text
    found = list(states(record, chance, seed))
    chosen = set(random.Random(seed).sample(range(len(found)), min(again, len(found))))
    outcomes = []
    for i, (name, tree) in enumerate(found):
        lay(tree, scratch)
        fell = judge(scratch / command.out, old, new)
        if i in chosen and not fell:
            lay(tree, scratch)
            status, said = ended(command.again, scratch)
            done = contents(scratch / command.out) if (scratch / command.out).exists() else {}
            timed = frozenset(n for n in new if n.startswith(TELL_TIME)) if command.name in RESUMED else frozenset()
            if status or comparable(_unlocked(done), timed) != comparable(new, timed):
                fell = f"run again it ends with exit code {status}: {said.strip()[-150:]}"
        outcomes.append(f"{name}: {fell}" if fell else "")
    ended_whole = lasting(record, command.out, new)
    outcomes.append(f"after the last step: {ended_whole}" if ended_whole else "")
    what = f"plait {command.name}: states a power loss may leave: the old result, the new one, or an error that says so"
    note = (
        f"{len(record.steps)} steps recorded; the command run again in {len(chosen)} of the states, to the same bytes"
    )
    kinds = [k for k in FLUSHES if len(without(record, k).steps) < len(record.steps)]
    controls = [control(record, k, command.out, old, new, scratch, judge) for k in kinds]
    about = f"plait {command.name} as if it left out its flushes of {', of '.join(kinds)}: the replay falls"
    return row(what, outcomes, [note]), row(about, controls)


def main() -> None:
    """Run and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(COMMANDS),
    )
    parser.add_argument("--random", type=int, default=3, help="random states for each beginning")
    parser.add_argument("--again", type=int, default=5, help="states in which the command is run again")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warm()
    rows: list[Row] = []
    with worlds() as fresh, tempfile.TemporaryDirectory(prefix=PLACE) as scratch:
        for name in given.only:
            place = Path(scratch) / "world"
            attack = partial(lost, COMMANDS[name], fresh(), place, given.random, given.again, given.seed)
            found = undisturbed(name, attack, lambda r: (r,))
            for r in found:
                print(f"{name}: tried {r.tried}, fell {r.fell} {r.notes}", file=sys.stderr, flush=True)
            rows += found
            write_part(given.to, "power", rows, " ".join(["python -P -m benchmarks.trust.power", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
