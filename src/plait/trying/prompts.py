"""Prompts from files: for everybody, or each for the task that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.border.counts import plural
from plait.errors import UsageError, printable
from plait.fidelity.texts import LIMIT, TextFile, Texts, checked, read_file
from plait.options import did_you_mean
from plait.trying.inputs import Trial
from plait.trying.records import Prompts
from plait.trying.written import kind_of

OF_TASK = "task"  # the column of a table that says whose prompt a row is


def tasks_of(trial: Trial) -> list[str]:
    """Name whose prompts there can be: the heads of a classifier, the adapters of a text model."""
    if kind_of(trial.merge) is None:
        return list(trial.merge.heads)
    return [a.name for a in trial.adapters] + [m.name for m in trial.missing] if trial.is_merge else [trial.merge.name]


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file of prompts.

    Args:
        place: As it was given.
        task: Whose it is by that; "" where nobody is named.
        table: What it holds.
    """

    place: str
    task: str
    table: TextFile


def read_files(places: Sequence[str]) -> list[PromptFile]:
    """Read ``FILE``, ``FILE:COLUMN[,COLUMN]`` or ``TASK=FILE`` each: before a model is looked for, since one may be wrong.

    Raises:
        UsageError: A task twice.
        InputError: A file that cannot be read.
    """
    files: list[PromptFile] = []
    for place in places:
        task, equals, file = place.partition("=")
        if not equals or Path(place).exists():
            files.append(PromptFile(place, "", read_file(place, by=OF_TASK)))
            continue
        if task in [f.task for f in files]:
            raise UsageError(f"--prompts names {printable(task)!r} twice")
        files.append(PromptFile(place, task, read_file(file)))
    return files


def read_prompts(files: Sequence[PromptFile], texts: Sequence[str], tasks: Sequence[str]) -> Prompts:
    """Say who is asked what.

    Rows of a table with a column "task" go to the tasks that it names, those with an empty cell to everybody; where it names none of
    this merge's, all go to everybody, which is noted.

    Args:
        files: From `read_files`.
        texts: Prompts beside them, for everybody.
        tasks: From `tasks_of`.

    Raises:
        UsageError: Nothing to ask, or a task that the merge does not have.
        InputError: An empty prompt, pairs and single texts mixed.
    """
    for_all: list[tuple[str, ...]] = [(text,) for text in texts]
    of_tasks: dict[str, list[tuple[str, ...]]] = {}
    notes: list[str] = []
    for file in files:
        table = file.table
        if file.task:
            _require_known(file.task, tasks, f"prompts for {printable(file.task)!r}")
            of_tasks.setdefault(file.task, []).extend(table.texts)
            continue
        notes += _notes(table, tasks, file.place)
        for text, owner in zip(table.texts, _owners(table, tasks, file.place), strict=True):
            (of_tasks.setdefault(owner, []) if owner else for_all).append(text)
    if not for_all and not of_tasks:
        raise UsageError("nothing to ask", hint="--prompts FILE, or --prompt TEXT")
    return Prompts(
        _checked(for_all, "the prompts"), {t: _checked(x, f"prompts of {t}") for t, x in of_tasks.items()}, tuple(notes)
    )


def _checked(texts: Sequence[tuple[str, ...]], where: str) -> Texts:
    return checked(tuple(texts), where)


def _require_known(task: str, tasks: Sequence[str], what: str) -> None:
    if task not in tasks:
        raise UsageError(f"{what}, and no task of that name in this merge", hint=did_you_mean(task, list(tasks)))


def _owners(table: TextFile, tasks: Sequence[str], place: str) -> list[str]:
    """Whose each text is; "" for everybody's."""
    if not _is_of(table, tasks):
        return [""] * len(table.texts)
    for owner in filter(None, table.owners):
        _require_known(owner, tasks, f"{place}: column {OF_TASK!r} names {printable(owner)!r}")
    return list(table.owners)


def _is_of(table: TextFile, tasks: Sequence[str]) -> bool:
    """Whether a table's column names any of the tasks."""
    return any(owner in tasks for owner in table.owners)


def _notes(table: TextFile, tasks: Sequence[str], place: str) -> list[str]:
    """Say which rows are not asked, and where a column of tasks names none of these."""
    notes = []
    if table.owners and not _is_of(table, tasks):
        others = ", ".join(sorted({printable(o, 40) for o in table.owners if o})[:3])
        notes.append(
            f"{Path(place).name}: column {OF_TASK!r} names no task of this merge ({others}), so its rows are for everybody"
        )
    if table.total > len(table.texts):
        each = " of each task" if table.owners else ""
        notes.append(f"{Path(place).name}: the first {LIMIT}{each} of {plural(table.total, 'row')} are asked")
    return notes
