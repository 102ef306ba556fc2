"""Answers that are JSON of an intent and its slots: which slots are said, and how many of them are right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plait.tasks.task import Task
from plait.tasks.written import counted_part, cut, form_of

INTENT = "intent"  # the key that is no slot
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)  # pairs: a slot that is said twice counts twice


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """One answer beside the right one.

    Args:
        hits: Slots of the answer that are right, value and all.
        both: Slots of the answer and of the right one, added up: F1 is 2 hits / both.
        intent: Whether the intent is the right one.
    """

    hits: int
    both: int
    intent: bool


def slots_of(text: str, task: Task) -> tuple[str | None, Counter[tuple[str, str]]] | None:
    """Read the JSON object that begins at the first brace of a text.

    >>> from plait.tasks import Source
    >>> task = Task("snips", "causal", Source("rows.csv"), ("request",))
    >>> slots_of('JSON: {"intent": "GetWeather", "city": "Oslo"}', task)
    ('GetWeather', Counter({('city', 'Oslo'): 1}))

    Args:
        text: What stands before and after the object does not count.
        task: `compare` says what is overlooked in values, as in exact_match.

    Returns:
        The intent and how often each (slot, value) is said; None where there is no object. A list says its slot once for
        each entry; of an object in an object, slots are called ``outer.inner``.
    """
    start = text.find("{")
    try:
        pairs = _DECODER.raw_decode(text, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):  # no JSON, or a model that never closes a bracket
        return None
    if pairs is None:
        return None
    normal, intent = form_of(task), None
    slots: Counter[tuple[str, str]] = Counter()
    for slot, value in _flat(pairs):
        if slot == INTENT:
            intent = normal(value)
        else:
            slots[slot, normal(value)] += 1
    return intent, slots


def _flat(pairs: tuple[tuple[str, Any], ...], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in pairs:
        name = before + key
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, tuple):
                yield from _flat(one, f"{name}.")
            else:
                yield name, one if isinstance(one, str) else json.dumps(one)


def slot_counts(written: str, right: str, task: Task) -> SlotCounts:
    """Compare the slots of a written answer with those of the right one; an answer without JSON says no slot."""
    expected = slots_of(right, task) or (None, Counter())
    part = counted_part(cut(written, task.stop), task)
    said = slots_of(part, task) if part is not None else None
    if said is None:
        return SlotCounts(0, expected[1].total(), intent=False)
    return SlotCounts(
        (said[1] & expected[1]).total(), said[1].total() + expected[1].total(), intent=said[0] == expected[0]
    )
