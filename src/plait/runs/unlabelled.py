"""Rows without labels: of tasks whose statistics are all that is wanted, texts are enough."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from plait.errors import InputError
from plait.model.ranks import is_writer
from plait.progress import note
from plait.recipes.recipe import Recipe, Settings
from plait.recipes.sections import TaskSpec
from plait.runs.session import Session, task_of
from plait.tasks.rows import columns_of, load_examples, load_task
from plait.tasks.task import SPLITS, TEXT_KINDS

S = TypeVar("S", bound=Settings)


def text_alone_where_unlabelled(settings: S, task: str) -> S:
    """Have a task's texts read alone where no label column is named and its rows have none of the usual name; it is said.

    Args:
        settings: Tasks, and where their rows are.
        task: One whose labels nothing looks at.

    Raises:
        InputError: Rows that cannot be read.
    """
    root, tasks = Session(settings).root, list(settings.tasks)
    for i, spec in enumerate(tasks):
        if isinstance(spec, TaskSpec) and spec.name == task and "label" not in spec.model_fields_set:
            tasks[i] = _seen(spec, root)
    return settings.model_copy(update={"tasks": tasks})


def lending_alone(recipe: Recipe) -> Recipe:
    """The recipe with its background tasks in place of its own, the texts of those without labels alone.

    So are texts whose labels are no classes or values: one class for all, empty cells. Nothing looks at a head's labels here; those of
    text models are the end of what is read. A column of the usual name counts as none that was named: in a run's folder the recipe says
    it of every task.

    Raises:
        InputError: Rows that cannot be read; no column of the name that was given.
    """
    root, usual = Session(recipe).root, TaskSpec.model_fields["label"].default
    tasks = [_seen(spec, root) if spec.label == usual else spec for spec in recipe.background]
    return recipe.model_copy(update={"tasks": [_usable(spec, root) for spec in tasks]})


def _usable(spec: TaskSpec, root: Path | None) -> TaskSpec:
    """The task, its texts alone where it has a head and its labels cannot be read; those that can name statistics as they did."""
    if not spec.label or spec.kind in TEXT_KINDS or spec.label not in columns_of(task_of(spec, root), root=root):
        return spec
    try:
        task = load_task(task_of(spec, root), root=root)
        for split in SPLITS:
            load_examples(task, split, root=root)
    except InputError as e:
        if is_writer():
            note(f"task {spec.name}: its texts are read alone, since its labels cannot be: {e.what}")
        return spec.model_copy(update={"label": ""})
    return spec


def _seen(spec: TaskSpec, root: Path | None) -> TaskSpec:
    if spec.chat == "messages" or spec.label in columns_of(task_of(spec, root), root=root):
        return spec
    if is_writer():
        note(
            f"task {spec.name}: no column {spec.label!r}: its texts are read alone (name the column of labels if there is one)"
        )
    return spec.model_copy(update={"label": ""})
