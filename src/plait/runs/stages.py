"""How units are done: each stage reads what earlier ones left, computes, and leaves a folder that is whole or not there."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import write_adapter
from plait.adapters.tensor_file import write_tensors
from plait.border.records import to_json
from plait.disk.store import staged_folder
from plait.evaluation.features import features, task_vector_norm
from plait.evaluation.interference import predicted_shifts
from plait.evaluation.protocol import Answers, Scorer, cross_fitted, tuned
from plait.evaluation.splits import HALVES, Split, split_rows
from plait.merging import Merged
from plait.runs.collecting import collect_file, is_collected
from plait.runs.layout import Layout
from plait.runs.pending import cost
from plait.runs.reporting import Report
from plait.runs.session import Session
from plait.runs.sources import BACKGROUND, adapters_of, diverged, merged_of, statistics_of
from plait.runs.trainings import train
from plait.runs.units import ALONE, DIVERGED, FEATURES, MERGE, REPAIR, REPAIRED, STATISTICS, TRAIN, TUNING, Unit
from plait.statistics import open_statistics

ANSWERS_FILE = "answers.safetensors"
MAX_MERGES_AHEAD = 2  # merges computed before they are scored
Record = dict[str, Any]  # what a unit leaves in its manifest


def do(
    units: Sequence[Unit],
    layout: Layout,
    *,
    report: Report | None = None,
    until: float | None = None,
) -> int:
    """Do units whose needs are there: all trainings together first, the others one by one.

    Args:
        units: Not done yet.
        layout: Where they lie.
        report: Hears what begins and how far it is.
        until: `time.monotonic()` after which no further unit is begun.

    Returns:
        How many were done.
    """
    report = report or Report()
    trainings = [u for u in units if u.stage in (TRAIN, REPAIR)]
    if trainings:
        train(trainings, layout, report)
    others = _not_diverged([u for u in units if u.stage not in (TRAIN, REPAIR)], layout)
    done = len(units) - len(others)
    for here in (layout.of(u) for u in others if u.stage == MERGE):
        here.session.load()  # while it loads, transformers sets the whole process's default dtype
    with ThreadPoolExecutor(1) as ahead:  # the next merge is computed while this one is scored
        merges: dict[int, Future[Merged]] = {}
        for i, unit in enumerate(others):
            if until is not None and time.monotonic() > until:
                break
            report.begin(unit.label, cost(unit, layout))
            for j in range(i, min(i + MAX_MERGES_AHEAD + 1, len(others))):
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


def _one(unit: Unit, layout: Layout, merge: Future[Merged] | None) -> None:
    makers: dict[str, Any] = {STATISTICS: _collect, ALONE: _alone, REPAIRED: _alone, FEATURES: _features}
    result: Record = {}
    merged = merge.result() if merge is not None else None
    path, wanted = layout.path(unit), layout.wanted(unit)
    with staged_folder(path, wanted, overwrite=layout.overwrite, result=result, unit=True) as folder:
        if merged is not None:
            _score_merge(unit, layout, folder, result, merged)
        else:
            makers[unit.stage](unit, layout, folder, result)
    if unit.stage == STATISTICS:
        shutil.rmtree(parts_of(unit, layout), ignore_errors=True)


# --- statistics -------------------------------------------------------------------------------------------------------


def parts_of(unit: Unit, layout: Layout) -> Path:
    """Where a unit's finished files lie until all of them are there, so that an interruption loses none."""
    path = layout.path(unit)
    return path.parent / f".{path.name}.{layout.key(unit)[:12]}.files"


def _collect(unit: Unit, layout: Layout, folder: Path, result: Record) -> None:
    """The statistics of every task, and of the background, one file each."""
    sessions = [(layout.session, "")] + ([(layout.background, BACKGROUND)] if layout.recipe.background else [])
    own = layout.recipe.statistics.model_copy(update={"pool": unit.pool, "samples": unit.samples})
    lent = own.model_copy(update={"output_gradients": False})  # starts read inputs alone
    wanted = layout.wanted(unit)
    for whole, prefix in sessions:
        spec = lent if prefix else own
        session = Session(whole.recipe.model_copy(update={"statistics": spec}), whole)
        for name in session.tasks:
            finished = parts_of(unit, layout) / f"{prefix}{name}.stats.safetensors"
            finished.parent.mkdir(parents=True, exist_ok=True)
            if not is_collected(finished, wanted):
                collect_file(session, name, finished, seed=unit.seed, wanted=wanted, overwrite=True)
            shutil.copyfile(finished, folder / finished.name)
            sites = open_statistics(finished).sites
            result[prefix + name] = {"tokens": max(m.count for m in sites.values())}


# --- merges and scores ------------------------------------------------------------------------------------------------


def scorer_of(unit: Unit, layout: Layout) -> Scorer:
    """Make the scorer of a unit: with the heads of its adapters, on the rows of each split."""
    heads = {t: a.heads.get(t, {}) for t, a in adapters_of(unit, layout).items()}
    together = layout.session.base.torch_device.type != "cpu"
    return Scorer(layout.session.evaluator, splits(layout), heads, together)


def splits(layout: Layout) -> dict[str, Split]:
    """Task -> which of its validation rows are in which part."""
    rows = layout.rows
    options = {"seed": rows["split_seed"], "tuning_rows": rows["tuning_rows"], "grid_rows": rows["grid_rows"]}
    return {t: split_rows(len(layout.labels(t)), **options) for t in layout.tasks}


def _score_merge(unit: Unit, layout: Layout, folder: Path, result: Record, merged: Merged) -> None:
    scorer, scales = scorer_of(unit, layout), layout.recipe.scales_of(layout.recipe.merge(unit.merge))
    if unit.split == TUNING:
        result |= to_json(tuned(scorer, merged.adapter, scales))
    else:
        found, answers = cross_fitted(scorer, merged.adapter, scales, grow=layout.recipe.grows)
        result |= to_json(found)
        _keep(folder, answers)
    if layout.recipe.tuned:
        result["discarded_energy"] = merged.record.loss.discarded_energy
    else:  # few enough to keep
        result |= to_json(merged.record)
        write_adapter(folder, merged.adapter)


def _alone(unit: Unit, layout: Layout, folder: Path, result: Record) -> None:
    """Each adapter on its own task, the bare base with the task's head; plain adapters on every other task too."""
    scorer, adapters = scorer_of(unit, layout), adapters_of(unit, layout)
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
            if (
                part != "tuning" and layout.recipe.arm(unit.arm).is_plain and unit.stage == ALONE
            ):  # for the best single adapter
                rows = split.grid[part]
                crossed = scorer.answers(task, [(adapters[n], 1.0) for n in names], rows)
                for name, found in zip(names, crossed, strict=True):
                    value = scorer.score(task, found, rows)
                    result[part].setdefault("crossed", {}).setdefault(name, {})[task] = value
    result["delta_norm"] = {t: task_vector_norm(a) for t, a in adapters.items()}
    if unit.split != TUNING:
        _keep(folder, answers)


def _features(unit: Unit, layout: Layout, folder: Path, result: Record) -> None:
    adapters, statistics = adapters_of(unit, layout), statistics_of(unit, layout)[0]
    shifts = predicted_shifts(adapters, statistics)
    known = {i: {j: s if math.isfinite(s) else None for j, s in row.items()} for i, row in shifts.items()}
    result |= {"tasks": features(adapters, statistics), "shifts": known}


def _keep(folder: Path, answers: dict[str, Answers]) -> None:
    write_tensors(folder / ANSWERS_FILE, {k: torch.from_numpy(v) for k, v in answers.items()})
