"""All modules of a merge, each made when it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from plait.merging.inputs import MergeInputs


@dataclass(frozen=True, slots=True)
class Views(Sequence[MergeInputs]):
    """What a model-wide pass may hold: every module's inputs, made when they are looked at and released after.

    Args:
        view: A module's name, and no context -> its inputs.
        names: Of the modules.
    """

    view: Callable[[str, Any], MergeInputs]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> MergeInputs: ...

    @overload
    def __getitem__(self, index: slice) -> Views: ...

    def __getitem__(self, index: int | slice) -> MergeInputs | Views:
        if isinstance(index, slice):
            return Views(self.view, self.names[index])
        return self.view(self.names[index], None)
