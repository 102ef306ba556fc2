"""Right answers as rows hold them, checked: lists of references, and JSON where slots are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plait.errors import InputError
from plait.tasks.slots import slots_of
from plait.tasks.task import SLOT_METRICS, Task


def checked_references(
    cells: Sequence[Any], ids: Iterable[Any], column: str, where: str
) -> tuple[tuple[str, ...], ...]:
    """Check a column of lists of right answers.

    Args:
        cells: One list of strings a row.
        ids: Numbers of the rows in the source.
        column: The column's name.
        where: The task and its file.

    Raises:
        InputError: A cell that is no list of strings, an empty list, an empty string; names the row.
    """
    for i, cell in zip(ids, cells, strict=True):
        if not isinstance(cell, list) or not cell or not all(isinstance(x, str) and x.strip() for x in cell):
            raise InputError(f"column {column!r} has no list of right answers in row {i}", where=where)
    return tuple(tuple(x.strip() for x in cell) for cell in cells)


def require_slots(task: Task, labels: Sequence[str], ids: Iterable[Any], where: str) -> None:
    """Refuse right answers without a JSON object where a metric counts slots: none of an answer's could be right.

    Args:
        task: Its metrics say whether slots are counted.
        labels: The right answers.
        ids: Numbers of the rows in the source.
        where: The task and its file.

    Raises:
        InputError: Names the row.
    """
    if not set(task.metrics) & set(SLOT_METRICS):
        return
    for i, label in zip(ids, labels, strict=True):
        if slots_of(label, task) is None:
            raise InputError(
                f"the answer in row {i} is no JSON object",
                where=where,
                hint=f"{' and '.join(SLOT_METRICS)} count slots of JSON",
            )
