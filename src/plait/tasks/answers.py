"""Right answers as rows hold them, checked: lists of references, and JSON where slots are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plait.errors import InputError
from plait.tasks.slots import INTENT, slots_of
from plait.tasks.task import SLOT_METRICS, Task

_EXACT = 2**53  # floats from here on are not told apart by one


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

    And rows of which none has an intent where intents are compared: whatever says none would be right.

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
    said: set[str] = set()
    asked = False
    for i, label in zip(ids, labels, strict=True):
        if (found := slots_of(label, task)) is None:
            raise InputError(
                f"the answer in row {i} is no JSON object",
                where=where,
                hint=f"{' and '.join(SLOT_METRICS)} count slots of JSON",
            )
        asked |= found[0] is not None
        said |= {slot for slot, _ in found[1]}
    if not asked and "intent_accuracy" in task.metrics:
        keys = f"; there are {', '.join(sorted(said)[:12])}" if said else ""
        hint = f"intent_accuracy compares what stands under {INTENT!r}"
        raise InputError(f"no answer has the key {INTENT!r}{keys}", where=where, hint=hint)


def named_answer(task: Task, value: Any, row: Any, split: str, where: str) -> str:
    """Give what is to be written for a cell: the cell as text or, where it numbers the task's answers, the one of that number.

    A number that is an answer means itself; so do all numbers where some answer is one: 2 is "2", not the third of "1", "2", "more".

    Args:
        task: With its answers, where they are known.
        value: The cell; a whole number is written as one, also where others of its column are fractions.
        row: Its row, for the message.
        split: "train" or "validation", whose answers may be others than those of training.
        where: Task and file, for the message.

    Raises:
        InputError: A number that is neither an answer nor the number of one.
    """
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    text, labels = str(int(value) if whole else value), task.labels or ()
    if not labels or not isinstance(value, int) or text in labels:
        return text
    if any(_spells(name, type(value)) for name in labels):
        known = split != "train"
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


def numbered(cells: Sequence[Any], labels: Sequence[str]) -> Sequence[Any]:
    """Read a column of text as numbers where it holds nothing else and not all of it is among the answers: it numbers them.

    >>> numbered(["1", "0"], ("no", "yes")), numbered(["1", "0"], ("0", "1"))
    ([1, 0], ['1', '0'])

    Args:
        cells: One of each row.
        labels: The task's answers; without any nothing is numbered.
    """
    texts = [c for c in cells if isinstance(c, str)]
    if not labels or len(texts) < len(cells) or set(texts) <= set(labels):
        return cells
    if all(c.removeprefix("-").isdecimal() for c in texts):
        return [int(c) for c in texts]
    return [c.lower() == "true" for c in texts] if {c.lower() for c in texts} <= {"true", "false"} else cells


def are_numbers(labels: Sequence[str]) -> bool:
    """Whether all classes are called by whole numbers."""
    return bool(labels) and all(name.removeprefix("-").isdecimal() for name in labels)


def _spells(text: str, kind: type) -> bool:
    if kind is bool:
        return text in ("True", "False")
    return text.removeprefix("-").replace(".", "", 1).isdecimal()
