"""Scoring adapter folders on the tasks whose heads they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.adapters.config import read_config
from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.border.multipliers import checked_multiplier
from plait.border.records import optional
from plait.disk.hub import cached_folder, split_revision
from plait.disk.overwriting import require_apart, require_place
from plait.disk.store import staged_file
from plait.errors import UsageError
from plait.evaluation.evaluate import halves
from plait.evaluation.scores import ALONE, FLOOR, REPORTED, SELECTION, Score, are_scores, mean_score, write_scores
from plait.fidelity.arguments import is_adapter, place_of
from plait.progress import Progress
from plait.recipes.recipe import Settings
from plait.recipes.recipe_file import require_known
from plait.runs.lengths import say_of_rows
from plait.runs.session import Session
from plait.tasks.lengths import Cut
from plait.tasks.task import TEXT_KINDS, require_same_classes


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One adapter on one task, percent.

    Args:
        score: Mean of the task's metrics.
        floor: The base with the same head alone.
        n: Rows.
        metrics: Name -> value.
        cut: What `data.max_length` takes from the rows; None where it takes nothing.
    """

    score: float
    floor: float
    n: int
    metrics: Mapping[str, float]
    cut: Cut | None = optional(kind=Cut)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One adapter on the tasks whose heads it carries, percent.

    Args:
        adapter: Its name.
        scale: Multiple of its update.
        mean, floor: Over tasks; of the adapter, and of the base with the same heads.
        tasks: Task -> its scores.
        without_task: Heads that are not scored because the recipe has no task of their name.
    """

    adapter: str
    scale: float
    mean: float
    floor: float
    tasks: Mapping[str, TaskScore]
    without_task: tuple[str, ...] = ()


def base_of(folders: Sequence[str]) -> str | None:
    """Find the base that adapters were trained on, as they name it, where it is a folder on this machine or in the hub's cache.

    Nothing is downloaded on a record's word.
    """
    named = {read_config(place_of(f)).base for f in folders if is_adapter(f) and place_of(f).is_dir()}
    base = next(iter(named)) if len(named) == 1 else ""
    here = bool(base) and ((Path(base).expanduser() / "config.json").is_file() or cached_folder(*split_revision(base)))
    return base if here else None


def evaluate_folders(
    settings: Settings,
    folders: Sequence[str],
    *,
    scales: Sequence[float] | None,
    out: Path | None,
    overwrite: bool,
    task: str = "",
    quiet: bool = True,
) -> list[Evaluated]:
    """Score adapter folders on the tasks whose heads they carry.

    Args:
        settings: Base, data and tasks.
        folders: ``DIR`` or ``NAME=DIR``.
        scales: With a grid, the best scale is chosen on one half of the validation rows and scores are of the other half;
            without, scale 1 on all rows.
        out: Where the long table goes, if anywhere.
        overwrite: Replace it.
        task: Only this one of the recipe's tasks; all by default.
        quiet: No progress on stderr.
    """
    from plait.merging.folders import read_named

    if task:
        named = dict(zip(settings.task_names, settings.tasks, strict=True))
        require_known(task, list(named), "task")
        settings = settings.model_copy(update={"tasks": [named[task]]})
    for scale in scales or ():
        checked_multiplier(scale, "a scale")
    session = Session(settings)
    evaluated: list[Evaluated] = []
    rows: list[Score] = []
    if out is not None:
        require_apart(out, [f if Path(f).exists() else f.partition("=")[2] for f in folders])
        require_place(out, are_scores, overwrite=overwrite)
    progress, cuts = Progress(float(len(folders)), len(folders), quiet), dict[str, Cut]()
    for folder in folders:
        adapter = read_named(folder)
        progress.start(adapter.name, 1.0)
        summary, scored = _evaluate(adapter, session, scales, progress, cuts)
        progress.finish()
        left = () if task else tuple(sorted(set(adapter.heads) - set(session.tasks)))
        evaluated.append(replace(summary, without_task=left))
        rows += scored
    progress.close(f"{plural(len(evaluated), 'adapter')} scored")
    if out is not None:
        with staged_file(out, overwrite=overwrite, ours=are_scores) as stage:
            write_scores(stage, rows)
    return evaluated


def _evaluate(
    adapter: Adapter, session: Session, scales: Sequence[float] | None, progress: Progress, cuts: dict[str, Cut]
) -> tuple[Evaluated, list[Score]]:
    tasks = [t for t, task in session.tasks.items() if t in adapter.heads or task.kind in TEXT_KINDS]
    if not tasks:
        heads = ", ".join(adapter.heads) or "none"
        raise UsageError(
            f"it carries heads for {heads}; the tasks are {', '.join(session.tasks)}",
            where=adapter.name,
            hint="NAME=DIR",
        )
    for t in tasks:
        if t in adapter.heads:
            adapter.require_of_texts(t)
        require_same_classes(session.tasks[t], adapter.classes_of(t), adapter.name)
    for t in (t for t in tasks if t not in cuts):
        cuts[t] = say_of_rows(session, t, session.validation(t), split="validation")
    evaluator, grid = session.evaluator, sorted(set(scales or [1.0]))
    parts = {t: halves(len(session.validation(t)), session.recipe.evaluation.split_seed) for t in tasks}
    if scales is None:
        parts = {t: {REPORTED: range(len(session.validation(t)))} for t in tasks}  # type: ignore[dict-item]
    rows: list[Score] = []
    passes, done = len(tasks) * ((len(grid) if len(grid) > 1 else 0) + 2), 0

    def score(kind: str, scale: float, split: str) -> None:
        nonlocal done
        for t in tasks:
            progress.within(
                done / passes, f"on {t}, pass {done + 1} of {passes}, {plural(len(parts[t][split]), 'row')}"
            )
            done += 1
            part: Any = parts[t][split]
            logits = evaluator.predict(t, adapter.heads.get(t, {}), adapter if kind == ALONE else None, scale, part)
            labels = {"arm": "", "adapter": kind, "method": adapter.name, "scale": scale, "seed": 0, "split": split}
            rows.extend(evaluator.score_rows(logits, t, part, **labels))

    if len(grid) > 1:
        for scale in grid:
            score(ALONE, scale, SELECTION)
    chosen = max(grid, key=lambda s: mean_score(r for r in rows if r.scale == s)) if len(grid) > 1 else grid[0]
    score(ALONE, chosen, REPORTED)
    score(FLOOR, 0.0, REPORTED)
    return _summary(adapter.name, chosen, tasks, rows, cuts), rows


def _summary(
    name: str, scale: float, tasks: Sequence[str], rows: Sequence[Score], cuts: Mapping[str, Cut]
) -> Evaluated:
    reported = [r for r in rows if r.split == REPORTED]
    by_task: dict[str, TaskScore] = {}
    for t in tasks:
        own = {r.metric: r for r in reported if r.task == t and r.adapter == ALONE}
        floor = mean_score(r for r in reported if r.task == t and r.adapter == FLOOR)
        metrics = {m: r.value for m, r in own.items() if m != "score"}
        by_task[t] = TaskScore(own["score"].value, floor, own["score"].n, metrics, cuts[t] if cuts[t].cut else None)
    mean = sum(s.score for s in by_task.values()) / len(by_task)
    floor = sum(s.floor for s in by_task.values()) / len(by_task)
    return Evaluated(name, scale, mean, floor, by_task)
