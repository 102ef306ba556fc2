"""One command measured, and two of them beside each other: whole processes, from their start to their end."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class Case:
    """Something that is timed beside something else.

    Args:
        what: In words, such as "sum of eight RoBERTa-large r8 q+v adapters".
        command: Arguments of `plait`, or a whole command where `whole` is set.
        beside: What runs beside it, in words; "" for nothing.
        reference: Its command.
        out: What the commands write; removed before each run, and its size is recorded.
        limit: The largest ratio that is meant to be, and the largest `peak_mb`; None where none was set.
        repeats: How often each is run; the fastest counts.
        whole: Whether `command` is no command of plait's.
        by: "seconds" or "cpu": which of both the ratio compares.
        before: Called before every run of the command.
    """

    what: str
    command: Command
    beside: str = ""
    reference: Command = ()
    out: tuple[Path, ...] = ()
    limit: float | None = None
    limit_mb: float | None = None
    repeats: int = 3
    whole: bool = False
    by: str = "seconds"
    before: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: wall seconds, seconds of all its processors, peak of resident memory, and what it left on the disk."""

    seconds: float
    cpu: float
    peak_mb: float
    written_mb: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of docs/results/speed.json; the fastest run of each side.

    Args:
        ratio: `seconds` over `beside_seconds`, or the same of `cpu` where `by` says so; None without a reference.
        limit, limit_mb: What was aimed at.
    """

    what: str
    command: str
    seconds: float
    cpu: float
    peak_mb: float
    written_mb: float
    beside: str
    beside_seconds: float | None
    beside_cpu: float | None
    beside_peak_mb: float | None
    ratio: float | None
    by: str
    limit: float | None
    limit_mb: float | None


def timed(command: Command, out: Sequence[Path] = ()) -> Timing:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    for path in out:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(list(command), stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{said.read()[-2000:]}")
    return Timing(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, sum(map(_size, out)) / 1e6)


def compared(case: Case, plait: Command) -> Row:
    """Run a case and its reference in turns, so that a machine that slows down slows both.

    Args:
        case: What to run.
        plait: How plait is called.
    """
    mine: list[Timing] = []
    theirs: list[Timing] = []
    for _ in range(case.repeats):
        case.before()
        mine.append(timed(case.command if case.whole else [*plait, *case.command], case.out))
        if case.reference:
            theirs.append(timed(case.reference, case.out))
    for path in case.out:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    written = mine[0].written_mb
    seconds, cpu, peak = _least(mine)
    beside = _least(theirs) if theirs else (None, None, None)
    ratio = None
    if theirs:
        ratio = cpu / min(t.cpu for t in theirs) if case.by == "cpu" else seconds / min(t.seconds for t in theirs)
    shown = " ".join(case.command if case.whole else ["plait", *case.command])
    return Row(
        case.what, shown, seconds, cpu, peak, written, case.beside, *beside, ratio, case.by, case.limit, case.limit_mb
    )


def _least(runs: Sequence[Timing]) -> tuple[float, float, float]:
    return min(t.seconds for t in runs), min(t.cpu for t in runs), max(t.peak_mb for t in runs)


def _size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path] if path.exists() else []
    return sum(p.stat().st_size for p in files)
