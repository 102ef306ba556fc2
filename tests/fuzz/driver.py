"""Running many inputs in one process or several, and counting what held and what fell."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from plait.adapters import hashing
from plait.disk import files
from tests.fuzz.targets import TARGETS, Target, attempt, write

SLOW = 15.0  # seconds that no input may take
_MEMORY = 6 << 30  # address space, torch's libraries and all
CHUNK = 2000


@dataclass(slots=True)
class Tally:
    """What became of one target's inputs.

    Args:
        tried, accepted, fell: Inputs.
        kinds: "type at file:line" -> how many.
        examples: The same -> the first such input: its seed, and the message.
    """

    tried: int = 0
    accepted: int = 0
    fell: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count another's inputs too."""
        self.tried += other.tried
        self.accepted += other.accepted
        self.fell += other.fell
        for kind, n in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + n
            self.examples.setdefault(kind, other.examples[kind])


def place_of(error: BaseException) -> str:
    """Type and innermost line of plait's (or of the targets') own code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/plait/" in f.filename or "/fuzz/" in f.filename] or list(frames)
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def run(target: Target, seed: int, count: int, stop: float = float("inf")) -> Tally:
    """Feed a target `count` inputs, each drawn from (seed, its number); stops early at a time of `time.monotonic`."""
    found, starts = Tally(), target.seeds()
    with _scratch() as place, _without_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(count):
            if time.monotonic() > stop:
                break
            rng = random.Random(f"{target.what} {seed} {i}")
            path = write(target.change(rng.choice(starts), rng), place, target.file)
            accepted, error = _timed(target, path)
            found.tried += 1
            found.accepted += accepted
            if error is not None:
                kind = place_of(error)
                found.fell += 1
                found.kinds[kind] = found.kinds.get(kind, 0) + 1
                found.examples.setdefault(kind, f"seed {seed} input {i}: {error!s:.200}")
    return found


def reproduce(target: Target, seed: int, number: int, place: Path) -> Path:
    """Write one input again, to look at it."""
    rng = random.Random(f"{target.what} {seed} {number}")
    return write(target.change(rng.choice(target.seeds()), rng), place, target.file)


def _timed(target: Target, path: Path) -> tuple[bool, BaseException | None]:
    """One input within the time it may take."""
    signal.setitimer(signal.ITIMER_PROF, SLOW)  # of this process's own work: the machine may be busy
    try:
        return attempt(target, path)
    except TimeoutError as e:
        return False, e
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"over {SLOW:.0f} s")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory, where there is one, and the alarm set."""
    before = signal.signal(signal.SIGPROF, _too_slow)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        try:
            yield Path(name)
        finally:
            signal.signal(signal.SIGPROF, before)


class _Inline:
    """What a pool of threads does, done at once: starting a thread for each input took most of the time."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, call: Callable[..., Any], *args: object) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*args))
        except Exception as e:
            done.set_exception(e)
        return done

    def shutdown(self, **_: object) -> None: ...


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Hashing in this thread, with small buffers."""
    with patch.object(hashing, "ThreadPoolExecutor", _Inline), patch.object(files, "HASHED_BYTES_AT_ONCE", 1 << 14):
        yield


def _limited() -> None:
    """Bound the memory of a process of its own: what calls this keeps the bound, and so does all that it starts."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def job(number: int, seed: int, count: int, stop: float = float("inf")) -> tuple[int, dict[str, Any]]:
    """One target's chunk, for a pool."""
    found = run(TARGETS[number], seed, count, stop)
    return number, {slot: getattr(found, slot) for slot in Tally.__slots__}


def fuzz(
    count: int,
    *,
    processes: int = 1,
    seed: int = 0,
    only: str = "",
    seconds: float = float("inf"),
    log: Path | None = None,
) -> dict[str, Tally]:
    """Feed all targets, by their shares, `count` inputs in all.

    Args:
        count: Inputs.
        processes: How many at once.
        seed: Of everything.
        only: Targets whose name holds this.
        seconds: Nothing is begun after so long.
        log: Where the tallies so far are kept, after every chunk.
    """
    chosen = [i for i, t in enumerate(TARGETS) if only in t.what]
    total = sum(TARGETS[i].share for i in chosen)
    jobs = []
    for i in chosen:
        wanted = round(count * TARGETS[i].share / total)
        jobs += [(i, seed * 10**6 + k, min(CHUNK, wanted - k)) for k in range(0, wanted, CHUNK)]
    jobs.sort(key=lambda j: j[1])  # the targets in turn
    tallies = {TARGETS[i].what: Tally() for i in chosen}
    stop = time.monotonic() + seconds
    for number, found in _results(jobs, processes, stop):
        tallies[TARGETS[number].what].add(Tally(**found))
        if log is not None:
            log.write_text(json.dumps(rows(tallies), indent=1) + "\n", encoding="utf-8")
    return tallies


def _results(jobs: Sequence[tuple[int, int, int]], processes: int, stop: float) -> Iterator[tuple[int, dict[str, Any]]]:
    if processes == 1:
        yield from (job(*j, stop) for j in jobs)
        return
    with ProcessPoolExecutor(processes, initializer=_limited) as pool:
        for done in [pool.submit(job, *j, stop) for j in jobs]:
            yield done.result()


def rows(tallies: dict[str, Tally]) -> list[dict[str, Any]]:
    """One row a target: what, tried, held, fell, and what is worth knowing."""
    return [
        {
            "what": f"fuzzed {what}: plait's own error or a sound value",
            "tried": t.tried,
            "held": t.tried - t.fell,
            "fell": t.fell,
            "notes": [
                f"{t.accepted} accepted",
                *(f"{k} ({n} times): {t.examples[k]}" for k, n in sorted(t.kinds.items())),
            ],
        }
        for what, t in tallies.items()
    ]
