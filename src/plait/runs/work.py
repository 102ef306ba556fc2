"""How units are done, and what each that is not a training computes: statistics, merges, scores, features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.adapters.tensor_file import write_tensors
from plait.disk.store import staged_folder
from plait.evaluation.features import features, task_vector_norm
from plait.evaluation.protocol import Answers, Scorer, cross_fitted, tuned
from plait.evaluation.splits import HALVES, Split, split_rows
from plait.runs.collecting import collect_task
from plait.runs.recipe import PLAIN_ARMS
from plait.runs.session import Session
from plait.runs.sources import BACKGROUND, adapters_of, diverged, merged_of, statistics_of
from plait.runs.trainings import Told, train
from plait.runs.units import (
    ALONE,
    DIVERGED,
    FEATURES,
    MERGE,
    REPAIR,
    REPAIRED,
    STATISTICS,
    TRAIN,
    TUNING,
    Layout,
    Unit,
)
from plait.statistics import write_statistics

ANSWERS_FILE = "answers.safetensors"
_AHEAD = 2  # merges computed before they are scored


def do(units: Sequence[Unit], layout: Layout, *, tell: Told = lambda text: None, until: float | None = None) -> int:
    """Do units whose needs are there: all trainings as one fleet first, the others one by one.

    Args:
        units: Not done yet.
        layout: Of the study.
        tell: Called with a line about each thing that begins.
        until: `time.monotonic()` after which no further unit is begun.

    Returns:
        How many were done.
    """
    trainings = [u for u in units if u.stage in (TRAIN, REPAIR)]
    if trainings:
        tell(f"training {len(trainings)} sets of adapters")
        train(trainings, layout, tell)
    others = _not_diverged([u for u in units if u.stage not in (TRAIN, REPAIR)], layout)
    done = len(units) - len(others)
    if any(u.stage == MERGE for u in others):  # while it loads, transformers sets the whole process's default dtype
        layout.session.load()
    with ThreadPoolExecutor(1) as ahead:  # the next merge is computed while this one is scored
        merges: dict[int, Future[Adapter]] = {}
        for i, unit in enumerate(others):
            if until is not None and time.monotonic() > until:
                break
            tell(unit.label)
            for j in range(i, min(i + _AHEAD + 1, len(others))):
                if others[j].stage == MERGE and j not in merges:
                    merges[j] = ahead.submit(merged_of, others[j], layout.of(others[j]))
            _one(unit, layout.of(unit), merges.pop(i, None))
            done += 1
        for future in merges.values():
            future.cancel()
    return done


def _not_diverged(units: Sequence[Unit], layout: Layout) -> list[Unit]:
    """Units without the scores of sweep trainings that diverged: these get the reason as their result."""
    found = []
    for unit in units:
        root = layout.path(layout.trained_by(unit)) if unit.split == TUNING else None
        reasons = [f"{t}: {why}" for t in layout.tasks if (why := diverged(root / t))] if root else []
        if reasons:
            with staged_folder(layout.path(unit), layout.wanted(unit), result={DIVERGED: "; ".join(reasons)}):
                pass
        else:
            found.append(unit)
    return found


def _one(unit: Unit, layout: Layout, merged: Future[Adapter] | None) -> None:
    makers: dict[str, Any] = {STATISTICS: _statistics, ALONE: _alone, REPAIRED: _alone, FEATURES: _features}
    result: dict[str, Any] = {}
    made = merged.result() if merged is not None else None
    with staged_folder(layout.path(unit), layout.wanted(unit), result=result) as folder:
        if made is not None:
            _score_merge(unit, layout, folder, result, made)
        else:
            makers[unit.stage](unit, layout, folder, result)


# --- statistics -------------------------------------------------------------------------------------------------------


def _statistics(unit: Unit, layout: Layout, folder: Path, result: dict[str, Any]) -> None:
    sessions = [(layout.session, "")] + ([(layout.background, BACKGROUND)] if layout.study.background else [])
    spec = layout.study.statistics.model_copy(update={"pool": unit.pool, "samples": unit.samples})
    for whole, prefix in sessions:
        session = Session(whole.recipe.model_copy(update={"statistics": spec}), whole)
        for name, task in session.tasks.items():
            found = collect_task(session, task, session.sample(name, unit.seed), parts=folder / "parts")
            write_statistics(folder / f"{prefix}{name}.stats.safetensors", found, identity=layout.wanted(unit))
            result[prefix + name] = {"tokens": max(m.count for m in found.sites.values())}


# --- merges and scores ------------------------------------------------------------------------------------------------


def _scorer(unit: Unit, layout: Layout) -> Scorer:
    heads = {t: a.heads.get(t, {}) for t, a in adapters_of(unit, layout).items()}
    together = layout.session.base.torch_device.type != "cpu"
    return Scorer(layout.session.evaluator, splits(layout), heads, together)


def splits(layout: Layout) -> dict[str, Split]:
    """Task -> which of its validation rows are in which part."""
    study = layout.study
    options = {"seed": study.evaluation.split_seed, "tuning_rows": study.tuning_rows, "grid_rows": study.grid_rows}
    return {t: split_rows(len(layout.labels(t)), **options) for t in layout.tasks}


def _score_merge(unit: Unit, layout: Layout, folder: Path, result: dict[str, Any], merged: Adapter) -> None:
    spec = next(m for m in layout.study.merge_specs if m.name == unit.merge)
    scorer, start = _scorer(unit, layout), layout.study.scales_of(spec)
    if unit.split == TUNING:
        result |= tuned(scorer, merged, start)
    else:
        found, answers = cross_fitted(scorer, merged, start)
        result |= found
        _keep(folder, answers)
    result["discarded_energy"] = merged.source["discarded_energy"]


def _alone(unit: Unit, layout: Layout, folder: Path, result: dict[str, Any]) -> None:
    """Each adapter on its own task, the bare base with the task's head; plain adapters on every other task too."""
    scorer, adapters = _scorer(unit, layout), adapters_of(unit, layout)
    answers: dict[str, Answers] = {}
    parts = ("tuning",) if unit.split == TUNING else HALVES
    names = list(adapters)
    for task, split in scorer.splits.items():
        for part in parts:
            rows = split.tuning if part == "tuning" else split.halves[part]
            worn: list[tuple[Adapter | None, float]] = [(adapters[task], 1.0), (None, 0.0)]
            for kind, found in zip(("alone", "floor"), scorer.answers(task, worn, rows), strict=True):
                result.setdefault(part, {}).setdefault(kind, {})[task] = scorer.score(task, found, rows)
                answers[f"{kind}.{task}.{part}"] = found
            if part != "tuning" and unit.arm in PLAIN_ARMS and unit.stage == ALONE:  # for the best single adapter
                rows = split.grid[part]
                crossed = scorer.answers(task, [(adapters[n], 1.0) for n in names], rows)
                for name, found in zip(names, crossed, strict=True):
                    value = scorer.score(task, found, rows)
                    result[part].setdefault("crossed", {}).setdefault(name, {})[task] = value
    result["delta_norm"] = {t: task_vector_norm(a) for t, a in adapters.items()}
    if unit.split != TUNING:
        _keep(folder, answers)


def _features(unit: Unit, layout: Layout, folder: Path, result: dict[str, Any]) -> None:
    result |= {"tasks": features(adapters_of(unit, layout), statistics_of(unit, layout)[0])}


def _keep(folder: Path, answers: dict[str, Answers]) -> None:
    write_tensors(folder / ANSWERS_FILE, {k: torch.from_numpy(v) for k, v in answers.items()})
