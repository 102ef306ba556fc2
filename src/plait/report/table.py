"""From the results on disk to rows: one row per arm, method and seed, as the protocol defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from plait.evaluation.splits import HALVES
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FOLDS, MERGE, REPAIRED, Unit
from plait.runs.waves import Choice, all_units, alone_level, chosen, chosen_alone, plain_arms, repair_units, result


@dataclass(frozen=True, slots=True)
class Row:
    """One merge of one arm and seed; scores in percent, means over tasks and over the two halves.

    Args:
        arm, method, seed, variant: Which.
        lr, step: The arm's choice; step 0 is the end of the training.
        scale_selected: Geometric mean of the two halves' scales; `scales` holds both.
        individual: The arm's adapters alone.
        floor, plain: The bare base with the task heads of the best plain arm, and that arm alone: what *recovered* is
            measured between.
        merged: The merge.
        selected: Its score on the rows its scale was chosen from, by half that was reported.
        recovered: (merged - floor) / (plain - floor); NaN where the plain arm has learned nothing (see `share`).
        kept: merged - individual averaged over tasks, in points.
        worst_task: merged - individual of the task that loses most, in points; `worst` names it.
        regret_half, regret_double: Points lost at half and twice the scale; None where the grid ends before.
        edge: A chosen scale lies on the edge of what was tried.
        tasks: Task -> merged score.
        discarded_energy: Share of the merged task vector that the cut to the summed rank took away.
    """

    arm: str
    method: str
    seed: int
    lr: float
    step: int
    scale_selected: float
    scales: tuple[float, ...]
    individual: float
    floor: float
    plain: float
    merged: float
    selected: Mapping[str, float]
    recovered: float
    kept: float
    worst_task: float
    worst: str
    regret_half: float | None
    regret_double: float | None
    edge: bool
    tasks: Mapping[str, float] = field(default_factory=dict)
    by_half: Mapping[str, float] = field(default_factory=dict)
    discarded_energy: float = 0.0
    variant: str = ""


LEARNED = 1.0  # points by which adapters alone must exceed the floor; a share of less would be a share of noise


def share(score: float, floor: float, alone: float) -> float:
    """*recovered*: the share of what adapters alone gain over the floor that a score keeps; NaN where that is no point."""
    return (score - floor) / (alone - floor) if alone - floor > LEARNED else math.nan


def rows_of(layout: Layout) -> list[Row]:
    """Every merge of a finished study.

    Raises:
        RunError: The study is not finished.
    """
    scored = [u for u in all_units(layout) if u.stage == MERGE and u.split == FOLDS]
    return [_row(layout, u) for u in dict.fromkeys(scored)]


def reference_unit(layout: Layout, seed: int) -> Unit:
    """The scores of the best plain arm alone, at its own best rate; which arm that is, the tuning rows decide."""
    arms = plain_arms(layout) or [a for a in layout.study.arm_specs if not a.joint and not a.like]
    best = max(arms, key=lambda a: alone_level(layout, a))
    choice = chosen_alone(layout, best) if best in plain_arms(layout) else chosen(layout, best)
    return _alone_unit(best.name, choice, seed)


def reference(layout: Layout, seed: int) -> tuple[str, dict[str, float], dict[str, float]]:
    """Name of the reference arm, its scores alone and its floor by task, of a seed."""
    unit = reference_unit(layout, seed)
    found = result(layout, unit)
    return unit.arm, task_means(found, "alone"), task_means(found, "floor")


def _alone_unit(arm: str, choice: Choice, seed: int, variant: str = "") -> Unit:
    return Unit(ALONE, seed, arm, choice.rate, choice.step, split=FOLDS, variant=variant)


def task_means(found: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Task -> mean of a score over the two halves."""
    return {t: float(np.mean([found[h][kind][t] for h in HALVES])) for t in found[HALVES[0]][kind]}


def _row(layout: Layout, unit: Unit) -> Row:
    found = result(layout, unit)
    own = task_means(
        result(layout, _alone_unit(unit.arm, Choice(unit.rate, unit.step), unit.seed, unit.variant)), "alone"
    )
    _, plain, floor = reference(layout, unit.seed)
    halves = found["halves"]
    tasks = {t: float(np.mean([halves[h]["score"][t] for h in HALVES])) for t in own}
    drops = {t: tasks[t] - own[t] for t in own}
    worst = min(drops, key=lambda t: drops[t])
    low, high, merged = (_over(tasks, v) for v in (floor, plain, tasks))
    scales = tuple(halves[h]["scale"] for h in HALVES)
    return Row(
        arm=unit.arm,
        method=unit.merge,
        seed=unit.seed,
        lr=unit.rate,
        step=unit.step,
        scale_selected=math.sqrt(scales[0] * scales[1]),
        scales=scales,
        individual=_over(tasks, own),
        floor=low,
        plain=high,
        merged=merged,
        selected={h: halves[h]["selected"] for h in HALVES},
        recovered=share(merged, low, high),
        kept=float(np.mean(list(drops.values()))),
        worst_task=drops[worst],
        worst=worst,
        regret_half=_mean_or_none([halves[h]["regret_half"] for h in HALVES]),
        regret_double=_mean_or_none([halves[h]["regret_double"] for h in HALVES]),
        edge=any(halves[h]["edge"] for h in HALVES),
        tasks=tasks,
        by_half={h: float(np.mean(list(halves[h]["score"].values()))) for h in HALVES},
        discarded_energy=float(found.get("discarded_energy") or 0.0),
        variant=unit.variant,
    )


def _over(tasks: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """Mean over the tasks of a row: a variant may have fewer than the study."""
    return float(np.mean([scores[t] for t in tasks]))


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def best_by_half(rows: list[Row], arm: str, variant: str = "") -> dict[str, str]:
    """Half that is reported -> the arm's best merge as the other half sees it, over all seeds."""
    mine = [r for r in rows if r.arm == arm and r.variant == variant]
    found = {}
    for half in HALVES:
        methods = sorted({r.method for r in mine})
        found[half] = max(methods, key=lambda m: np.mean([r.selected[half] for r in mine if r.method == m]))
    return found


def references(layout: Layout) -> list[dict[str, Any]]:
    """What a merge is measured against: adapters served apart, joint training, the best single adapter, repair."""
    found: list[dict[str, Any]] = []
    for seed in layout.study.seeds:
        name, plain, floor = reference(layout, seed)
        found.append(_reference("served separately", name, seed, plain, plain, floor))
        found += _crossed(layout, seed, plain, floor)
        for arm in (a for a in layout.study.arm_specs if a.joint):
            scores = task_means(result(layout, _alone_unit(arm.name, chosen(layout, arm), seed)), "alone")
            found.append(_reference("joint training", arm.name, seed, scores, plain, floor))
    for unit in repair_units(layout):
        _, plain, floor = reference(layout, unit.seed)
        done = result(layout, replace(unit, stage=REPAIRED, split=FOLDS))
        found.append(
            _reference(f"{unit.merge} and repair", unit.arm, unit.seed, task_means(done, "alone"), plain, floor)
        )
    return found


def _reference(
    kind: str, arm: str, seed: int, scores: Mapping[str, float], plain: Mapping[str, float], floor: Mapping[str, float]
) -> dict[str, Any]:
    low, high, mean = (_over(scores, v) for v in (floor, plain, scores))
    found = {"reference": kind, "arm": arm, "seed": seed, "score": mean, "recovered": share(mean, low, high)}
    return {**found, "tasks": dict(scores)}


def _crossed(layout: Layout, seed: int, plain: Mapping[str, float], floor: Mapping[str, float]) -> list[dict[str, Any]]:
    """The one adapter that does all tasks best (with each task's own head), chosen on one half, reported on the other."""
    found = []
    for arm in plain_arms(layout):
        crossed = result(layout, _alone_unit(arm.name, chosen(layout, arm), seed))
        parts: dict[str, list[float]] = {}
        for chosen_on, reported in zip(HALVES, reversed(HALVES), strict=True):
            names = crossed[chosen_on]["crossed"]
            best = max(names, key=lambda n: np.mean(list(names[n].values())))
            for task, value in crossed[reported]["crossed"][best].items():
                parts.setdefault(task, []).append(value)
        scores = {t: float(np.mean(v)) for t, v in parts.items()}
        found.append(_reference("best single adapter", arm.name, seed, scores, plain, floor))
    return found
