"""What work says while it goes on: to nobody, to a person who watches, or as lines to whoever started the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from plait.progress import Progress


class Report:
    """Says nothing; others override what they show."""

    def begin(self, text: str, cost: float = 1.0, units: int = 1) -> None:
        """Something begins.

        Args:
            text: What a person reads.
            cost: Its share of the work, in forward passes of one row.
            units: How many units are done by it.
        """

    def within(self, step: int, steps: int, loss: float | None = None) -> None:
        """What began last is so many of its steps along."""

    def note(self, text: str) -> None:
        """Something worth a line of its own, also where progress is not shown."""


@dataclass(slots=True)
class Lines(Report):
    """A line for everything that begins, and for every note."""

    write: Callable[[str], None]

    def begin(self, text: str, cost: float = 1.0, units: int = 1) -> None:
        """Write it."""
        self.write(text)

    def note(self, text: str) -> None:
        """Write it."""
        self.write(text)


@dataclass(slots=True)
class Shown(Report):
    """Progress on stderr, with the time that is left."""

    progress: Progress

    def begin(self, text: str, cost: float = 1.0, units: int = 1) -> None:
        """End what ran before and start a line."""
        self.progress.finish()
        self.progress.start(text, cost, units)

    def within(self, step: int, steps: int, loss: float | None = None) -> None:
        """Show how far it is."""
        self.progress.within(step / max(1, steps), f"step {step} of {steps}")

    def note(self, text: str) -> None:
        """Said with ``--quiet`` too."""
        Progress(0, 0).close(text)
