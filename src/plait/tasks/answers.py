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


def named_answer(task: Task, value: Any, row: Any, split: str, where: str) -> str:
    """Give what is to be written for a cell: the cell as text or, where it numbers the task's answers, the one of that number.

    Where all answers are numbers themselves, a number means itself: 2 is "2", not the third of "1", "2", "3".

    Args:
        task: With its answers, where they are known.
        value: The cell.
        row: Its row, for the message.
        split: "train" or "validation", whose answers may be others than those of training.
        where: Task and file, for the message.

    Raises:
        InputError: A number that is neither an answer nor the number of one.
    """
    labels = task.labels or ()
    if not labels or not isinstance(value, int):
        return str(value)
    if all(_spells(name, type(value)) for name in labels):
        text, known = str(value), str(value) in labels or split != "train"
    else:
        known = 0 <= value < len(labels)
        text = labels[value] if known else ""
    if not known:
        raise InputError(
            f"answer {value!r} in row {row} is not one of the {len(labels)} answers {list(labels)[:5]}, nor the number of one",
            where=where,
            hint="in `labels` numbers mean themselves, and names are counted from 0",
        )
    return text


def _spells(text: str, kind: type) -> bool:
    return text in ("True", "False") if kind is bool else text.removeprefix("-").isdecimal()
