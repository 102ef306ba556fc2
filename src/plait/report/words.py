"""The pieces a page is made of, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = [
    "NONE",
    "Cell",
    "Section",
    "Table",
    "Verdict",
    "between",
    "percent",
    "points",
    "signed",
]
NONE = "–"  # stands where there is no number


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that says more than its text.

    Args:
        text: What stands in it.
        note: A second, smaller line: an interval, a unit.
        tint: How strongly it is coloured, from -1 (a loss) over 0 to 1 (a gain); None for no colour.
        key: What it is sorted by; its text by default.
    """

    text: str
    note: str = ""
    tint: float | None = None
    key: float | None = None

    def __str__(self) -> str:
        """Write it in one line."""
        note = self.note if self.note.startswith("±") else f"({self.note})" if self.note else ""
        return f"{self.text} {note}".strip()


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; the first cell of each row names the row.

    Args:
        header: Names of the columns.
        rows: Cells, as many as columns.
        note: A sentence below it.
        caption: What it shows, above it and for screen readers.
        kind: "" for an ordinary table, "heat" for a map of numbers with a colour each, "wide" for one that may be wider than a
            narrow screen and keeps its first column in sight.
        strong: Numbers of the rows that stand out.
    """

    header: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    caption: str = ""
    kind: str = ""
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Args:
        title: Heading.
        text: Paragraphs, with an empty line between them.
        tables: Tables below the text.
        figure: Name of the figure below the text; "" for none.
        notes: Sentences a reader should not overlook.
        terms: (word, meaning) pairs.
    """

    title: str
    text: str
    tables: Sequence[Table] = ()
    figure: str = ""
    notes: Sequence[str] = ()
    terms: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out, before anything else.

    Args:
        number: The number that sums it up; a dash where none is defined.
        says: What the number is, as half a sentence.
        text: A sentence or two.
        facts: (what, answer) pairs.
        code: Lines of Python that load the result; "" for none.
        notes: Sentences a reader should not overlook.
    """

    number: str
    says: str
    text: str
    facts: Sequence[tuple[str, str]] = ()
    code: str = ""
    notes: Sequence[str] = field(default=())


def percent(share: float | None, form: str = "z.0f") -> str:
    """Write a share in percent; a dash where it is not defined.

    >>> percent(0.876), percent(float("nan"))
    ('88', '–')
    """
    return NONE if share is None or not math.isfinite(share) else format(100 * share, form)


def points(value: float | None) -> str:
    """Write points with one decimal; a dash where there are none."""
    return NONE if value is None else f"{value:z.1f}"


def signed(value: float) -> str:
    """Write a difference in points with its sign."""
    return f"{value:+z.1f}"


def between(low: float | None, high: float | None) -> str:
    """Write an interval of shares, in points with signs."""
    return NONE if low is None else f"{percent(low, '+z.1f')} to {percent(high, '+z.1f')}"
