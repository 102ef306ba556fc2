"""Rows of text without labels or answers: enough for what a task feeds into the layers, for nothing that learns or scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from plait.errors import UsageError
from plait.tasks.task import TEXT_KINDS, Task

UNKNOWN = ("?", "??")  # classes of a head that nothing looks at


def without_labels(task: Task) -> Task:
    """Complete a task of text alone: a head has to have some classes, and none of them is ever looked at.

    Raises:
        UsageError: A model that reads and writes apart, whose decoder reads the answers.
    """
    if task.kind == "seq2seq":
        raise UsageError(
            "a seq2seq model's decoder reads the answers, and these rows have none",
            where=f"task {task.name}",
            hint="--label COLUMN, in a recipe label: COLUMN",
        )
    return replace(task, labels=task.labels or UNKNOWN) if task.kind == "classification" else task


def no_labels(task: Task, count: int) -> Any:
    """As many labels as there are rows, in the form that the task's kind has them, saying nothing."""
    if task.kind in TEXT_KINDS:
        return ("",) * count
    return np.zeros(count, np.float32 if task.kind == "regression" else np.int64)
