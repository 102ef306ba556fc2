"""All modules of a merge, each made when it is looked at; and what is computed over all of them, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from plait.merging.inputs import MergeInputs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Views(Sequence[MergeInputs]):
    """What a model-wide pass may hold: every module's inputs, made when they are looked at and released after.

    Args:
        view: A module's name -> its inputs.
        names: Names of the modules.
        answers: What was computed over all of them, by function and settings.
        lock: Held while an answer is computed, so that modules side by side compute it once.
    """

    view: Callable[[str], MergeInputs]
    names: list[str]
    answers: dict[Hashable, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def once(self, function: Callable[..., T], *settings: Hashable) -> T:
        """Compute a function of all modules at the first call, and remember what it gave."""
        with self.lock:
            if (function, settings) not in self.answers:
                self.answers[function, settings] = function(self, *settings)
            answer: T = self.answers[function, settings]
            return answer

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make something of one module at the first call, and remember it; what is kept is small beside the factors."""
        if key not in self.answers:
            self.answers[key] = make()
        made: T = self.answers[key]
        return made

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> MergeInputs: ...

    @overload
    def __getitem__(self, index: slice) -> Views: ...

    def __getitem__(self, index: int | slice) -> MergeInputs | Views:
        if isinstance(index, slice):
            return Views(self.view, self.names[index])
        return self.view(self.names[index])
