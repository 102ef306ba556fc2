"""The answers that scored units keep, scored again under any weighting of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.adapters.tensors import read_tensors
from plait.border.counts import plural
from plait.errors import InputError
from plait.evaluation.bootstrap import Floats, weighted_score
from plait.evaluation.evaluate import is_open
from plait.evaluation.splits import Split
from plait.runs.inputs import INPUTS_FILE
from plait.runs.layout import Layout
from plait.runs.stages import ANSWERS_FILE, splits
from plait.runs.units import Unit

__all__ = ["KeptAnswers"]


@dataclass
class KeptAnswers:
    """What adapters and merges answered on the reported rows, read once each.

    Args:
        layout: Layout of a finished run.
    """

    layout: Layout
    parts: dict[str, Split] = field(init=False)
    _read: dict[Unit, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = splits(self.layout)

    def score(
        self, unit: Unit, kind: str, task: str, half: str, weights: Floats, metrics: Sequence[str] | None = None
    ) -> Floats:
        """Score a half of a task.

        Args:
            unit: A unit whose answers were kept.
            kind: "alone" or "floor" of a unit about adapters alone; "" of a merge.
            task: Name.
            half: "A" or "B".
            weights: (resamples, rows of the half) how often each example counts.
            metrics: The task's by default.

        Returns:
            (resamples,) the mean of the metrics, percent.

        Raises:
            InputError: Other labels than answers.
        """
        answers = self._answers(unit)[f"{kind}.{task}.{half}".removeprefix(".")]
        about, labels = self.layout.tasks[task], self.layout.labels(task)[self.parts[task].halves[half]]
        if len(answers) != len(labels):
            raise InputError(
                f"task {task!r}: {plural(len(labels), 'label')} of a half whose answers are {len(answers)}",
                where=str(self.layout.out / INPUTS_FILE if self.layout.recorded else self.layout.out),
                hint="restore the run's folder as it was written",
            )
        if about.kind != "regression" and not is_open(
            about
        ):  # the class is what was kept; metrics take scores of classes
            answers = np.eye(max(int(answers.max()), int(labels.max())) + 1)[answers]
        return weighted_score(metrics or about.metrics, answers, labels, weights)

    def _answers(self, unit: Unit) -> dict[str, npt.NDArray[Any]]:
        if unit not in self._read:
            tensors, _, _ = read_tensors(self.layout.of(unit).path(unit) / ANSWERS_FILE)
            self._read[unit] = {k: v.numpy() for k, v in tensors.items()}
        return self._read[unit]
