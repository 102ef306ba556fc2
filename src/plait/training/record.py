"""What is recorded of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.border.records import inline, nested, optional
from plait.tasks import Task
from plait.tasks.lengths import Cut

Curve = Sequence[tuple[int, float]]  # (step, mean loss since the one before)


@dataclass(frozen=True, slots=True)
class Losses:
    """The course of the loss.

    Args:
        first, last: First and last point of the curve; None without one.
        curve: Steps and mean losses since the one before.
    """

    first: float | None = None
    last: float | None = None
    curve: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, curve: Curve) -> Losses:
        """Summarise a curve.

        >>> Losses.of([(1, 0.9), (10, 0.12345678)])
        Losses(first=0.9, last=0.12345678, curve=((1, 0.9), (10, 0.123457)))
        """
        if not curve:
            return cls()
        return cls(curve[0][1], curve[-1][1], tuple((step, round(loss, 6)) for step, loss in curve))


@dataclass(frozen=True, slots=True)
class Selected:
    """The moment that was chosen on the selection rows.

    Args:
        step: The earliest step with the best score.
        score: That score.
        scores: (step, score) of every moment.
    """

    step: int
    score: float
    scores: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TrainRecord:
    """How an adapter was trained.

    Args:
        task, kind, labels: The task, and the names of its classes or answers, where any are known.
        backbone_prefix: The backbone's attribute in the task's model.
        steps: Steps that were taken.
        losses: The course of the loss.
        selected: The moment that was chosen, where selection rows were given.
        seconds: Time; in a fleet the member's share.
        fleet: Adapters that were trained in the same batch, where it was a fleet.
        completed: Module -> rows of A that were completed where it started (see the subspace method `osrm`).
        cut: What `max_length` takes from the training rows; None where it takes nothing.
        base: What `plait.model.identity.base_facts` says of the base.
    """

    task: str
    kind: str
    labels: tuple[str, ...] | None
    backbone_prefix: str
    steps: int
    losses: Losses = nested(Losses)
    seconds: float = 0.0
    fleet: int | None = optional()
    completed: Mapping[str, int] | None = optional()
    selected: Selected | None = optional(kind=Selected)
    cut: Cut | None = optional(kind=Cut)
    base: Mapping[str, Any] = inline()

    @classmethod
    def of(cls, task: Task, prefix: str, curve: Curve, steps: int, cut: Cut) -> TrainRecord:
        """Begin the record of a training that has ended."""
        labels = tuple(task.labels) if task.labels else None
        return cls(task.name, task.kind, labels, prefix, steps, Losses.of(curve), cut=cut if cut.cut else None)
