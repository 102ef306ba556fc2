"""What a person sees while a run goes on: lines on stderr that say what happens and how long it will take."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from plait.errors import printable

# Called with what is being done, for a person to read.
OnProgress = Callable[[str], None]
_LIVE_EVERY, _LOG_EVERY = 0.2, 15.0  # seconds between two lines about one job, on a terminal and in a log
_WINDOW = 60.0  # seconds over which the pace is taken: kinds of work differ in it, and so do a machine's hours
_ENOUGH = 0.02  # share of the work after which the pace tells something; before it, loading weighs too much


@dataclass(slots=True)
class Progress:
    """Counts work done in arbitrary units of cost and estimates the time left by the pace of the last minute.

    Args:
        total: Cost of all jobs to come.
        jobs: Number of jobs to come.
        quiet: Print nothing.
        stream: Where to; stderr by default. On a terminal the line of the running job is rewritten in place.
    """

    total: float
    jobs: int
    quiet: bool = False
    stream: TextIO | None = field(default_factory=lambda: sys.stderr)
    _done: float = 0.0
    _number: int = 0
    _first: int = 0
    _label: str = ""
    _cost: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0
    _seen: deque[tuple[float, float]] = field(default_factory=deque)

    def start(self, label: str, cost: float, jobs: int = 1) -> None:
        """A job begins, or several that are done together."""
        self._first = min(self._number + 1, self._number + jobs)
        self._number, self._label, self._cost = self._number + jobs, label, cost
        self._show(0.0, force=True)

    def within(self, fraction: float, said: str = "") -> None:
        """The running job is this far.

        Args:
            fraction: Share of it, in [0, 1].
            said: The same as a person counts it, such as "step 40 of 200"; the share in per cent by default.
        """
        self._show(fraction, said)

    def finish(self) -> None:
        """The running job is done; said twice it counts once."""
        self._done, self._cost = self._done + self._cost, 0.0
        if self._live:
            self._show(0.0, force=True)

    def close(self, text: str) -> None:
        """Leave the line and say how it ended."""
        if not self.quiet:
            self._write(f"{text}\n")

    @property
    def _live(self) -> bool:
        return not self.quiet and self.stream is not None and self.stream.isatty()

    def _show(self, fraction: float, said: str = "", *, force: bool = False) -> None:
        now = time.monotonic()
        done = self._done + fraction * self._cost
        pace = self._pace(now, done)
        if self.quiet or (not force and now - self._shown < (_LIVE_EVERY if self._live else _LOG_EVERY)):
            return
        self._shown = now
        left = f", about {duration((self.total - done) / pace)} left" if self.total > done and pace else ""
        inside = f" {said or f'{100 * fraction:.0f} %'}" if fraction or said else ""
        number = f"{self._first}-{self._number}" if self._first < self._number else f"{self._number}"
        self._write(f"[{number}/{self.jobs}] {self._label}{inside}{left}" + ("" if self._live else "\n"))

    def _pace(self, now: float, done: float) -> float:
        """Work a second over the last minute; over all of it where nothing was done in that, 0 while too little is."""
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW:
            self._seen.popleft()
        if done < _ENOUGH * self.total:
            return 0.0
        since, before = self._seen[0]
        if now > since and done > before:
            return (done - before) / (now - since)
        return done / max(now - self._started, 1e-9)

    def _write(self, text: str) -> None:
        if self.stream is None:  # closed before the start
            return
        try:
            self.stream.write(("\r\x1b[2K" if self._live else "") + text)
            self.stream.flush()
        except (OSError, ValueError):  # a closed stderr must not end a run
            self.quiet = True


def duration(seconds: float) -> str:
    """Write seconds as a person says them.

    >>> duration(4.2), duration(190), duration(7500)
    ('4 s', '3 min 10 s', '2 h 5 min')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"


def in_words(seconds: float) -> str:
    """A length of time that is not known well, as a person says it.

    >>> in_words(41.2), in_words(200.0), in_words(9000.0)
    ('40 seconds', '3 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def note(text: str) -> None:
    """One line on stderr about something to know, where there is a stderr."""
    try:
        sys.stderr.write(f"note: {printable(text, 2000)}\n")
    except (OSError, ValueError, AttributeError):  # a closed stderr must not end a command
        return
