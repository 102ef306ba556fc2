"""The numbers of a report: what each arm's adapters score alone and merged, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.adapters.tensors import read_tensors
from plait.disk.store import read_manifest
from plait.errors import RunError
from plait.evaluation.bootstrap import Floats, Resamples, weighted_score
from plait.evaluation.evaluate import halves, scored_labels
from plait.evaluation.scores import ALONE, FLOOR, MERGED, REPORTED, SELECTION, Score, mean_score
from plait.runs.jobs import ALONE as ALONE_JOB
from plait.runs.jobs import INITIAL, SCORES, Job, Plan
from plait.runs.recipe import PLAIN_ARMS
from plait.runs.session import Session
from plait.runs.stages import PREDICTIONS_FILE, all_scores
from plait.subspaces.start import completion_note

_LEARNED = 1.0  # points by which alone must exceed the floor before a ratio to that gain means anything


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks and seeds, percent, with its standard error over resampled examples (None without resamples)."""

    value: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the main table: an arm and a merge.

    Args:
        alone, merged: Mean score over tasks (and seeds), percent, on the reported half.
        floor: The base with the task heads, mean over arms.
        recovered: (merged - floor) / (alone - floor), a ratio; None where alone gains less than a point.
        against_plain: The same with the best plain arm's alone; None where the recipe has no plain arm.
        worst_task: The task that loses most against its own adapter, with that difference in points.
        scales: The scale chosen for each seed; `edge` says one lies on the edge of its grid.
    """

    arm: str
    merge: str
    alone: Estimate
    merged: Estimate
    floor: Estimate
    recovered: Estimate | None
    against_plain: Estimate | None
    worst_task: tuple[str, float]
    scales: tuple[float, ...]
    edge: bool


@dataclass(slots=True)
class Summary:
    """Everything the page shows."""

    lines: list[Line] = field(default_factory=list)
    per_task: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    interference: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def summarise(plan: Plan, session: Session) -> Summary:
    """Read the scores and predictions of a finished run and reduce them to a `Summary`."""
    rows = all_scores(plan)
    resampled = _resampled(plan, session)
    found = Summary(interference=interference(plan, session))
    arms = [a.name for a in plan.recipe.arm_specs]
    floor = Estimate(_mean(rows, adapter=FLOOR), _error(resampled, arms, FLOOR))
    plain = _best_plain(rows, arms)
    for arm in arms:
        found.per_task[arm] = _per_task(rows, arm)
        found.curves[arm] = _curves(rows, arm)
        for merge in plan.recipe.merge_specs:
            found.lines.append(_line(rows, resampled, arm, merge.name, floor, plain, arms))
            if found.lines[-1].edge:
                found.notes.append(f"{arm}, {merge.name}: the best scale lies on the edge of its grid; widen the grid.")
    if any(line.recovered is None for line in found.lines):
        found.notes.append(
            "Where adapters alone gain less than a point over the floor, no share of that gain is given."
        )
    found.notes += _completed(plan)
    return found


def _completed(plan: Plan) -> list[str]:
    """A note for every adapter of the first seed that starts from rows its subspace method had to complete."""
    notes = []
    for job in plan.of(INITIAL, seed=plan.recipe.seeds[0]):
        if rows := (read_manifest(job.path) or {}).get("result", {}).get("completed"):
            notes.append(f"{job.arm.name if job.arm else ''}, {completion_note(job.task or '', rows)}.")
    return notes


def _best_plain(rows: list[Score], arms: Iterable[str]) -> str | None:
    plain = [a for a in arms if a.partition("@")[0] in PLAIN_ARMS]  # at whatever rate and step
    return max(plain, key=lambda a: _mean(rows, adapter=ALONE, arm=a, split=SELECTION)) if plain else None


def _mean(rows: Iterable[Score], **wanted: Any) -> float:
    wanted = {"split": REPORTED, **wanted}
    return mean_score(r for r in rows if all(getattr(r, k) == v for k, v in wanted.items()))


def _line(
    rows: list[Score],
    resampled: Mapping[tuple[str, str, str], Floats],
    arm: str,
    merge: str,
    floor: Estimate,
    plain: str | None,
    arms: list[str],
) -> Line:
    alone, merged = _mean(rows, adapter=ALONE, arm=arm), _mean(rows, adapter=MERGED, arm=arm, method=merge)
    spread = {ALONE: resampled.get((arm, ALONE, "")), MERGED: resampled.get((arm, MERGED, merge))}
    floors = [resampled[a, FLOOR, ""] for a in arms if (a, FLOOR, "") in resampled]
    low = np.mean(floors, axis=0) if floors else None
    ratio = _recovered(alone, merged, floor.value, spread[ALONE], spread[MERGED], low)
    against = None
    if plain is not None:
        top = _mean(rows, adapter=ALONE, arm=plain)
        against = _recovered(top, merged, floor.value, resampled.get((plain, ALONE, "")), spread[MERGED], low)
    chosen = [r for r in rows if (r.arm, r.method, r.split, r.metric) == (arm, merge, REPORTED, "score")]
    scales = tuple(dict.fromkeys((r.seed, r.scale) for r in chosen))
    grid = {r.scale for r in rows if (r.arm, r.method, r.split) == (arm, merge, SELECTION)}
    edge = len(grid) > 1 and any(s in (min(grid), max(grid)) for _, s in scales)
    return Line(
        arm,
        merge,
        Estimate(alone, _std(spread[ALONE])),
        Estimate(merged, _std(spread[MERGED])),
        floor,
        ratio,
        against,
        _worst_task(rows, arm, merge),
        tuple(s for _, s in scales),
        edge,
    )


def _recovered(
    alone: float, merged: float, floor: float, alones: Floats | None, mergeds: Floats | None, floors: Floats | None
) -> Estimate | None:
    if not alone - floor >= _LEARNED:
        return None
    error = None
    if alones is not None and mergeds is not None and floors is not None:
        gains = alones - floors
        usable = gains > _LEARNED / 2
        error = float(np.std((mergeds - floors)[usable] / gains[usable], ddof=1)) if usable.sum() > 1 else None
    return Estimate((merged - floor) / (alone - floor), error)


def _worst_task(rows: list[Score], arm: str, merge: str) -> tuple[str, float]:
    tasks = sorted({r.task for r in rows})
    drops = {
        t: _mean(rows, adapter=MERGED, arm=arm, method=merge, task=t) - _mean(rows, adapter=ALONE, arm=arm, task=t)
        for t in tasks
    }
    worst = min(tasks, key=lambda t: drops[t])
    return worst, drops[worst]


def _per_task(rows: list[Score], arm: str) -> dict[str, dict[str, float]]:
    tasks = sorted({r.task for r in rows})
    merges = sorted({r.method for r in rows if r.arm == arm and r.adapter == MERGED})
    table: dict[str, dict[str, float]] = {}
    for t in tasks:
        table[t] = {kind: _mean(rows, adapter=kind, arm=arm, task=t) for kind in (FLOOR, ALONE)}
        table[t] |= {m: _mean(rows, adapter=MERGED, arm=arm, method=m, task=t) for m in merges}
    return table


def _curves(rows: list[Score], arm: str) -> dict[str, list[tuple[float, float]]]:
    mine = [r for r in rows if r.arm == arm and r.split == SELECTION and r.adapter == MERGED]
    found: dict[str, list[tuple[float, float]]] = {}
    for m in sorted({r.method for r in mine}):
        scales = sorted({r.scale for r in mine if r.method == m})
        found[m] = [(s, mean_score(r for r in mine if r.method == m and r.scale == s)) for s in scales]
    return found


def _resampled(plan: Plan, session: Session) -> dict[tuple[str, str, str], Floats]:
    """Mean score over tasks and seeds for every resample, by (arm, adapter, merge)."""
    count, seed = plan.recipe.evaluation.resamples, plan.recipe.evaluation.split_seed
    if count < 2:
        return {}
    parts = {t: halves(len(session.validation(t)), seed)[REPORTED] for t in session.tasks}
    draws = Resamples.draw({t: len(p) for t, p in parts.items()}, count, seed)
    gathered: dict[tuple[str, str, str], list[Floats]] = {}
    for job in plan.jobs:
        if job.stage in (ALONE_JOB, SCORES):
            for kind, means in _job_resamples(job, session, parts, draws).items():
                key = (job.arm.name if job.arm else "", kind, job.merge.name if job.merge else "")
                gathered.setdefault(key, []).append(means)
    return {key: np.mean(seeds, axis=0) for key, seeds in gathered.items()}


def _job_resamples(job: Job, session: Session, parts: Mapping[str, Any], draws: Resamples) -> dict[str, Floats]:
    tensors, _, _ = read_tensors(job.path / PREDICTIONS_FILE)
    found: dict[str, list[Floats]] = {}
    for key, tensor in tensors.items():
        kind, _, task = key.partition(".")
        predictions = tensor.numpy()
        if kind != MERGED:
            predictions = predictions[parts[task]]
        labels = scored_labels(session.tasks[task], session.validation(task))[parts[task]]
        if len(predictions) != len(labels):
            raise RunError(f"{len(predictions)} predictions for {len(labels)} labels", where=str(job.path))
        scored = weighted_score(session.tasks[task].metrics, predictions, labels, draws.counts[task])
        found.setdefault(kind, []).append(scored)
    return {kind: np.mean(tasks, axis=0) for kind, tasks in found.items()}


def _error(resampled: Mapping[tuple[str, str, str], Floats], arms: Iterable[str], kind: str) -> float | None:
    found = [resampled[a, kind, ""] for a in arms if (a, kind, "") in resampled]
    return _std(np.mean(found, axis=0)) if found else None


def _std(values: Floats | None) -> float | None:
    return None if values is None else float(np.std(values, ddof=1))


def interference(plan: Plan, session: Session) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> adapter's task -> other task -> predicted relative output shift, mean over modules, of the first seed.

    From files alone, without a forward pass (METHODS: tr(D M D^T) / tr(W0 M W0^T)).
    """
    from plait.evaluation.interference import predicted_shift
    from plait.runs.jobs import STATISTICS
    from plait.statistics import read_statistics

    seed = plan.recipe.seeds[0]
    statistics = {j.task or "": read_statistics(j.path) for j in plan.of(STATISTICS, seed=seed)}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for arm in plan.recipe.arm_specs:
        adapters = {task: session.adapter(path, task) for task, path in plan.adapters(arm, seed).items()}
        table[arm.name] = {
            i: {j: _mean_shift(predicted_shift(adapter, s)) for j, s in statistics.items()}
            for i, adapter in adapters.items()
        }
    return table


def _mean_shift(shifts: Mapping[str, float]) -> float:
    values = [v for v in shifts.values() if math.isfinite(v)]
    return sum(values) / len(values) if values else float("nan")
