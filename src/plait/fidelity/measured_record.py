"""What is recorded of a fidelity: what a merge keeps of each adapter, as tables and files have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from plait.border.records import inline, nested, optional
from plait.errors import InputError
from plait.fidelity.measure import Fidelity, TaskFidelity

# What has to be known of one adapter for its fidelity.
_MEASURED = {f.name for f in fields(TaskFidelity) if f.default is MISSING and f.name != "task"}


@dataclass(frozen=True, slots=True)
class KeptOfTask:
    """What one merge keeps of one adapter, as tables and files have it.

    Args:
        task: Name of the adapter's task.
        assumed_error: Relative squared error on assumed inputs, where nothing was measured.
        measured: Its fidelity, where texts were read.
        kept, followed: What `TaskFidelity` makes of it; of records that were written when these were something else, too.
    """

    task: str = ""
    assumed_error: float | None = optional()
    measured: Mapping[str, Any] = inline()
    kept: float | None = optional()
    followed: float | None = optional()

    def __post_init__(self) -> None:
        if not _MEASURED - self.measured.keys():
            fidelity = self.fidelity
            object.__setattr__(self, "kept", fidelity.kept)
            object.__setattr__(self, "followed", fidelity.followed)

    @classmethod
    def of(cls, t: TaskFidelity) -> KeptOfTask:
        """Record a measured fidelity."""
        return cls(t.task, None, t.fields())

    @property
    def fidelity(self) -> TaskFidelity:
        """What was measured.

        Raises:
            InputError: Too little, as by an earlier version.
        """
        if lacking := sorted(_MEASURED - self.measured.keys()):
            raise InputError(f"the record says nothing of its {lacking[0]}", where=self.task, hint="--overwrite")
        known = {f.name for f in fields(TaskFidelity)}
        values: dict[str, Any] = {k: tuple(v) if k == "shift" else v for k, v in self.measured.items() if k in known}
        return TaskFidelity(self.task, **values)


@dataclass(frozen=True, slots=True)
class FidelityRecord:
    """What one merge keeps of every adapter.

    Args:
        score: How far they are followed on average: what candidates are ranked by.
        general_kl: KL(base || merged) on general text; None where there was none.
        tasks: Adapters, the worst first.
    """

    score: float = math.nan
    general_kl: float | None = None
    tasks: tuple[KeptOfTask, ...] = nested(KeptOfTask, ())

    @classmethod
    def of(cls, fidelity: Fidelity) -> FidelityRecord:
        """Record a measured fidelity."""
        return cls(fidelity.score, fidelity.general_kl, tuple(map(KeptOfTask.of, fidelity.tasks)))
