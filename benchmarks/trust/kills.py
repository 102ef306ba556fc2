"""Kills at random moments: ``PYTHONPATH=src:. python -P -m benchmarks.trust.kills --to FOLDER --count 200``.

A command is killed (SIGKILL, its process group) at a moment drawn over the time that it takes, and then run again. Held: the
second run succeeds, its result has the bytes of an undisturbed one (recorded times aside), every file that was there before
is unchanged, and nothing hidden is left. Commands start by fork after everything is imported, so that kills meet the work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.trust import Row, row, undisturbed, write_part
from benchmarks.trust.small import (
    COMMANDS,
    RESUMED,
    TELL_TIME,
    Command,
    comparable,
    contents,
    differing,
    ended,
    litter,
    require_done,
    start,
    warm,
    worlds,
)

SHARE = {"train": 0.08, "run": 0.02, "study run": 0.02}  # of all kills; the short commands share the rest
TIMED = ("train", "run", "study run")  # whose folders hold pages that tell recorded times


@dataclass(frozen=True, slots=True)
class Reference:
    """What a command writes when nothing happens.

    Args:
        files: The bytes of its result.
        volatile: Files that differ between two such runs, as they tell times.
        seconds: How long it takes.
    """

    files: dict[str, bytes]
    volatile: frozenset[str]
    seconds: float


def reference(command: Command, fresh: Callable[[], Path]) -> Reference:
    """Run a command undisturbed, twice where its result holds times."""
    found, seconds = [], []
    for _ in range(2 if command.name in TIMED else 1):
        world = prepared(command, fresh)
        begun = time.monotonic()
        require_done(command.args, world)
        seconds.append(time.monotonic() - begun)
        found.append(contents(world / command.out))
    told = frozenset(n for n in found[0] if n.startswith(TELL_TIME)) if command.name in RESUMED else frozenset()
    return Reference(found[0], differing(found[0], found[-1]) | told, statistics.fmean(seconds))


def prepared(command: Command, fresh: Callable[[], Path]) -> Path:
    """A fresh world, with the result that is to be overwritten where there is one."""
    world = fresh()
    if command.before:
        require_done(command.before, world)
    return world


def inputs(command: Command, world: Path) -> dict[str, bytes]:
    """Everything that lies in a world beside the command's result."""
    found = contents(world)
    return {
        n: d for n, d in found.items() if n != command.out and not n.startswith((f"{command.out}/", f".{command.out}."))
    }


def killed(command: Command, world: Path, seconds: float, whole: Reference) -> tuple[float | None, str]:
    """Kill a command after so many seconds and run it again: when it had ended by itself, if it had, and what fell."""
    before, code, begun = inputs(command, world), 0, time.monotonic()
    with tempfile.NamedTemporaryFile() as said:
        pid = start(command.args, world, Path(said.name))
        while time.monotonic() - begun < seconds:
            time.sleep(0.002)
            ended_already, code = os.waitpid(pid, os.WNOHANG)
            if ended_already:
                return time.monotonic() - begun, "" if code == 0 else f"undisturbed it ends with status {code}"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            os.killpg(pid, signal.SIGKILL)  # children of its own
        caught = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return None if caught else time.monotonic() - begun, resumed(command, world, before, whole)


def resumed(command: Command, world: Path, before: dict[str, bytes], whole: Reference) -> str:
    """Run a command again after it was disturbed; what is wrong then, "" where nothing is."""
    code, said = ended(command.again, world)
    if code:
        return f"run again it ends with exit code {code}: {said.strip()[-200:]}"
    if inputs(command, world) != before:
        return "lost: an input is not what it was"
    if left := litter(world):
        return f"litter: {', '.join(left[:3])}"
    there, wanted = comparable(contents(world / command.out), whole.volatile), comparable(whole.files, whole.volatile)
    other = sorted(n for n in {*there, *wanted} if there.get(n) != wanted.get(n))
    return f"other bytes: {', '.join(other[:3])}" if other else ""


def campaign(command: Command, fresh: Callable[[], Path], count: int, rng: random.Random, whole: Reference) -> Row:
    """Kill a command `count` times while it runs, each in a fresh world."""
    outcomes: list[str] = []
    longest, missed = whole.seconds, 0
    while len(outcomes) < count and missed < 3 * count:
        seconds = rng.uniform(0, longest)
        over, fell = killed(command, prepared(command, fresh), seconds, whole)
        if over is None or fell:
            outcomes.append(f"after {seconds:.3f} s: {fell}" if fell else "")
        else:
            longest, missed = 0.7 * longest + 0.3 * over, missed + 1  # a busy machine is not always as slow
    what = f"plait {command.name}, killed at a random moment and run again: nothing lost, no litter, the same bytes"
    note = f"{missed} more had ended before their kill and are not counted; undisturbed it took {whole.seconds:.2f} s at first"
    aside = f"; compared without {', '.join(sorted(whole.volatile))}, which two undisturbed runs write differently"
    return row(what, outcomes, [note + (aside if whole.volatile else "")])


def _attacked(command: Command, fresh: Callable[[], Path], count: int, rng: random.Random) -> Row:
    return campaign(command, fresh, count, rng, reference(command, fresh))


def counts(names: list[str], total: int) -> dict[str, int]:
    """How many kills each command gets: trainings, runs and studies a share of their own, the others the rest."""
    found = {n: max(1, round(total * SHARE[n])) for n in names if n in SHARE}
    short = [n for n in names if n not in SHARE]
    left = max(0, total - sum(found.values()))
    return found | {n: left // len(short) + (i < left % len(short)) for i, n in enumerate(short)}


def main() -> None:
    """Run and write the part's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warm()
    rng, rows = random.Random(given.seed), []
    with worlds() as fresh:
        for name, count in sorted(counts(given.only, given.count).items(), key=lambda c: (c[0] in SHARE, c[0])):
            command = COMMANDS[name]
            attack = partial(_attacked, command, fresh, count, rng)
            rows.append(undisturbed(name, attack, lambda r: r))
            print(f"{name}: tried {rows[-1].tried}, fell {rows[-1].fell} {rows[-1].notes}", file=sys.stderr, flush=True)
            write_part(given.to, "kills", rows, " ".join(["python -P -m benchmarks.trust.kills", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
