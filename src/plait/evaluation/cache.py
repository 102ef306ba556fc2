"""What scoring prepares once and uses again: rows as tokens, rows on the device, factors on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from plait.evaluation.answer_tree import AnswerTree
    from plait.evaluation.writing import Endings
    from plait.model.rowbank import RowBank
    from plait.model.stacked import Active, StackedFactors

T = TypeVar("T")
MOST_STACKS = 2  # sets of candidates whose factors stay on the device


class Shelf(Generic[T]):
    """Values by key; beyond `most` of them the oldest is dropped.

    >>> shelf = Shelf[int](most=1)
    >>> shelf.get("a", lambda: 1), shelf.get("a", lambda: 2), shelf.get("b", lambda: 3), shelf.get("a", lambda: 4)
    (1, 1, 3, 4)
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self._values = most, dict[Hashable, T]()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Give the value of a key, made where there is none yet."""
        if key not in self._values:
            value = make()
            while self.most is not None and len(self._values) >= self.most:
                self._values.pop(next(iter(self._values)))
            self._values[key] = value
        return self._values[key]


@dataclass(frozen=True, slots=True)
class Cache:
    """One evaluator's.

    Args:
        rows: Task -> its rows as token ids.
        prompts: Text task -> prompts and answers as token ids.
        banks: (task, positions of rows) -> those rows on the device, and the tree of a text task's answers.
        stacks: Candidates -> their factors on the device.
        longest: Text task -> tokens of its longest right answer.
        endings: Stop string of a task whose answers are written -> the tokens that end an answer.
    """

    rows: Shelf[list[dict[str, Any]]] = field(default_factory=Shelf)
    prompts: Shelf[tuple[list[list[int]], list[list[int]]]] = field(default_factory=Shelf)
    banks: Shelf[tuple[RowBank, AnswerTree | None]] = field(default_factory=Shelf)
    stacks: Shelf[tuple[dict[str, StackedFactors], list[Active]]] = field(default_factory=lambda: Shelf(MOST_STACKS))
    longest: Shelf[int] = field(default_factory=Shelf)
    endings: Shelf[Endings] = field(default_factory=Shelf)
