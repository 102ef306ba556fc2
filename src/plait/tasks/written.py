"""What counts as the same answer where a model writes it: where it ends, which part counts, what is overlooked."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from plait.errors import InputError, UsageError
from plait.tasks.task import Examples, Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[-+\u2212]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")  # with the minus of typesetting, too
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cut(text: str, stop: str | None) -> str:
    """Take the answer out of what a model wrote: without blanks around it, up to the stop string where there is one.

    Blanks before the answer are taken away first, so that a model that begins with a line feed is not cut to nothing.
    """
    begun = text.lstrip()
    return (begun.split(stop, 1)[0] if stop else begun).rstrip()


def same_answer(written: str, right: str, task: Task) -> bool:
    """Whether an answer counts as the right one by the task's `stop`, `extract` and `compare`.

    Args:
        written: What the model wrote.
        right: The row's label; where `extract` finds nothing in it, no answer is right.
        task: Says what is compared.
    """
    expected = _counted(right.strip(), task)
    return expected is not None and _counted(cut(written, task.stop), task) == expected


def require_some_right(task: Task, examples: Examples, where: str) -> None:
    """Refuse right answers of which none would count as right if a model wrote it: every score would be 0.

    So it is where they hold the stop string, and what a model writes ends there, or where `extract` or `compare` find nothing in them.

    Raises:
        InputError: Names the first of them.
    """
    if not task.is_written or "exact_match" not in task.metrics or not task.label_column or not len(examples):
        return
    if any(same_answer(y, y, task) for ys in examples.right for y in ys):
        return
    first = examples.right[0][0]
    holds = task.stop is not None and task.stop in first
    raise InputError(
        f"no right answer would count as right: {first!r:.60} "
        + (f"holds the stop string {task.stop!r}" if holds else "has nothing that `extract` and `compare` look for"),
        where=where,
        hint="another `stop`, or `extract` the part that is compared" if holds else "see `extract` and `compare`",
    )


def counted_part(text: str, task: Task) -> str | None:
    """Take the part of an answer that counts, by the task's `extract`; None where there is none."""
    if task.extract is None:
        return text
    match = pattern(task.extract, task.name).search(text)
    if match is None:
        return None
    part: str | None = match.group(1) if match.re.groups else match.group()
    return part  # None of a group that took no part in the match


def form_of(task: Task) -> Callable[[str], str]:
    """Give what brings a text into the form in which the task compares; a text without a number stays as it is."""
    form = _FORMS[task.compare or "exact"]

    def normal(text: str) -> str:
        value = form(text)
        return text if value is None else str(value.normalize() if isinstance(value, Decimal) else value)

    return normal


def _counted(text: str, task: Task) -> str | Decimal | None:
    """The part of an answer that counts, in the form in which it is compared; None where there is none."""
    part = counted_part(text, task)
    return None if part is None else _FORMS[task.compare or "exact"](part)


def pattern(text: str, task: str) -> re.Pattern[str]:
    """Compile a task's `extract`.

    Raises:
        UsageError: It is no regular expression.
    """
    try:
        return re.compile(text)
    except re.error as e:
        raise UsageError(f"extract {text!r} is no regular expression: {e}", where=f"task {task}") from None


def _as_it_is(text: str) -> str:
    return text.strip()


def _without_case(text: str) -> str:
    return " ".join(text.lower().split())


def _as_squad(text: str) -> str:
    """SQuAD's normalisation: case, punctuation, articles and repeated blanks are overlooked."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _as_number(text: str) -> Decimal | None:
    """The first number in a text, by value: 1,200 is 1200.0; None where there is none."""
    match = _NUMBER.search(text)
    try:
        return Decimal(match.group().replace(",", "").replace("\u2212", "-")) if match else None
    except InvalidOperation:
        return None


_FORMS: dict[str, Callable[[str], str | Decimal | None]] = {
    "exact": _as_it_is,
    "case": _without_case,
    "squad": _as_squad,
    "number": _as_number,
}
