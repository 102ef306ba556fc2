"""The pieces a page is made of, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NONE", "Section", "Table", "between", "percent", "points", "signed"]
NONE = "–"  # stands where there is no number


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Args:
        header: Names of the columns.
        rows: Cells, as many as columns.
        note: A sentence below it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Args:
        title: Heading.
        text: Paragraphs, with an empty line between them.
        tables: Tables below the text.
        figure: Name of the figure below the tables; "" for none.
        notes: Sentences a reader should not overlook.
        code: Lines of Python.
    """

    title: str
    text: str
    tables: Sequence[Table] = ()
    figure: str = ""
    notes: Sequence[str] = ()
    code: str = ""


def percent(share: float | None, form: str = ".0f") -> str:
    """Write a share in percent; a dash where it is not defined.

    >>> percent(0.876), percent(float("nan"))
    ('88', '–')
    """
    return NONE if share is None or not math.isfinite(share) else format(100 * share, form)


def points(value: float | None) -> str:
    """Write points with one decimal; a dash where there are none."""
    return NONE if value is None else f"{value:.1f}"


def signed(value: float) -> str:
    """Write a difference in points with its sign."""
    return f"{value:+.1f}"


def between(low: float | None, high: float | None) -> str:
    """Write an interval of shares, in points with signs."""
    return NONE if low is None else f"{percent(low, '+.1f')} to {percent(high, '+.1f')}"
