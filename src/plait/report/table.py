"""From the results on disk to rows: one row per arm, method and seed, as the protocol defines them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from plait.evaluation.bootstrap import Floats
from plait.evaluation.splits import HALVES
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FOLDS, MERGE, REPAIRED, Unit
from plait.runs.waves import (
    Choice,
    all_units,
    chosen,
    chosen_alone,
    learned,
    plain_arms,
    repair_units,
    result,
    sweep_units,
)

__all__ = ["LEARNED", "Ends", "ReferenceRow", "Row", "best_by_half", "recovered", "reference", "references", "rows_of"]
Number = TypeVar("Number", float, Floats)
LEARNED = 1.0  # points by which adapters alone must exceed the floor; a share of less would be a share of noise


def recovered(score: Number, floor: Number, alone: Number) -> Number:
    """Give the share of what adapters alone gain over the floor that a score keeps.

    It is recovered *of plain* where `alone` is the score of the plain reference arm, the same for all arms, and *of own* where
    it is the score of the arm's own adapters, which flatters an arm whose adapters are poor alone.

    Args:
        score: Score of a merge, percent.
        floor: Score of the bare base.
        alone: Score of adapters that each serve their own task.

    Returns:
        A ratio; NaN where adapters alone gain no more than a point (`LEARNED`), element by element for arrays.

    >>> print(recovered(55.0, floor=40.0, alone=70.0), recovered(41.0, floor=40.0, alone=41.0))
    0.5 nan
    """
    gain = alone - floor
    return (score - floor) / np.where(gain > LEARNED, gain, np.nan)  # type: ignore[return-value]


def mean(values: Iterable[float]) -> float:
    """Average values."""
    return float(np.mean(list(values)))


def mean_known(values: Iterable[float | None]) -> float | None:
    """Average the values that are known; None where none is.

    >>> mean_known([1.0, None, 2.0])
    1.5
    """
    known = [v for v in values if v is not None]
    return mean(known) if known else None


@dataclass(frozen=True, slots=True)
class Row:
    """One merge of one arm and seed; scores in percent, means over tasks and over the two halves.

    Args:
        arm, method, seed, variant: Coordinates; `variant` is the name of an ablation, "" for the study itself.
        lr, step: The arm's choice; step 0 is the end of the training.
        scale_selected: Geometric mean of the two halves' scales; `scales` holds both.
        individual: The arm's adapters alone.
        floor, plain: The bare base with the task heads of the best plain arm, and that arm alone: what *recovered* is
            measured between.
        merged: The merge.
        selected: Its score on the rows its scale was chosen from, by half that was reported.
        recovered: `recovered` of plain, (merged - floor) / (plain - floor); NaN where the plain arm has learned nothing.
        recovered_of_own: `recovered` of the arm's own adapters, (merged - floor) / (individual - floor).
        kept: merged - individual averaged over tasks, in points.
        worst_task: merged - individual of the task that loses most, in points; `worst` names it.
        regret_half, regret_double: Points lost at half and twice the scale; None where the grid ends before.
        edge: Whether a chosen scale lies on the edge of what was tried.
        tasks: Task -> merged score.
        by_half: Half -> merged score.
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
    recovered_of_own: float
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


@dataclass(frozen=True, slots=True)
class Ends:
    """What recovered is measured between, for one seed.

    Args:
        arm: Name of the reference arm: the best plain one.
        floor: Task -> score of the bare base with that arm's heads.
        alone: Task -> score of that arm's adapters.
    """

    arm: str
    floor: Mapping[str, float]
    alone: Mapping[str, float]

    def over(self, tasks: Iterable[str]) -> tuple[float, float]:
        """Average floor and alone over tasks: a variant may have fewer than the study."""
        names = list(tasks)
        return mean(self.floor[t] for t in names), mean(self.alone[t] for t in names)


def rows_of(layout: Layout) -> list[Row]:
    """Reduce every merge of a finished run to a row.

    Raises:
        RunError: The run is not finished.
    """
    scored = [u for u in all_units(layout) if u.stage == MERGE and u.split == FOLDS]
    return [_row(layout, u) for u in dict.fromkeys(scored)]


def reference_unit(layout: Layout, seed: int) -> Unit:
    """Find the scores of the best plain arm alone, at its own best rate.

    The tuning rows decide which arm that is. Where there is no sweep, the reported scores of the adapters alone do, over all
    seeds: among several plain arms the best is a little lucky, which can only make shares of it smaller.
    """
    plain = plain_arms(layout)
    arms = plain or [a for a in layout.recipe.arm_specs if not a.joint and not a.like]
    choices = {a.name: (chosen_alone if plain else chosen)(layout, a) for a in arms}

    def alone(name: str) -> float:
        if sweep_units(layout):
            return max(float(r["alone"]) for r in learned(layout, layout.recipe.arm(name)))
        seeds = layout.recipe.arm(name).seeds or layout.recipe.seeds
        units = [alone_unit(name, choices[name], s) for s in seeds]
        return mean(v for u in units for v in task_means(result(layout, u), "alone").values())

    best = max(choices, key=alone) if len(choices) > 1 else next(iter(choices))
    return alone_unit(best, choices[best], seed)


def reference(layout: Layout, seed: int) -> Ends:
    """Read what recovered is measured between, for one seed."""
    unit = reference_unit(layout, seed)
    scores = result(layout, unit)
    return Ends(unit.arm, task_means(scores, "floor"), task_means(scores, "alone"))


def alone_unit(arm: str, choice: Choice, seed: int) -> Unit:
    """Name the unit that holds the scores of an arm's adapters alone, on the reported rows."""
    return Unit(ALONE, seed, arm, choice.rate, choice.step, split=FOLDS)


def task_means(scores: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Average a kind of score, "alone" or "floor", over the two halves, task by task."""
    return {t: mean(scores[h][kind][t] for h in HALVES) for t in scores[HALVES[0]][kind]}


def _row(layout: Layout, unit: Unit) -> Row:
    scores = result(layout, unit)
    own = task_means(result(layout, replace(unit, stage=ALONE, merge="")), "alone")
    halves = scores["halves"]
    tasks = {t: mean(halves[h]["score"][t] for h in HALVES) for t in own}
    drops = {t: tasks[t] - own[t] for t in own}
    worst = min(drops, key=lambda t: drops[t])
    low, high = reference(layout, unit.seed).over(tasks)
    merged, individual = mean(tasks.values()), mean(own.values())
    scales = tuple(halves[h]["scale"] for h in HALVES)
    several = len({point["scale"] for point in scores["grid"]}) > 1
    return Row(
        arm=unit.arm,
        method=unit.merge,
        seed=unit.seed,
        lr=unit.rate,
        step=unit.step,
        scale_selected=math.sqrt(scales[0] * scales[1]),
        scales=scales,
        individual=individual,
        floor=low,
        plain=high,
        merged=merged,
        selected={h: halves[h]["selected"] for h in HALVES},
        recovered=recovered(merged, low, high),
        recovered_of_own=recovered(merged, low, individual),
        kept=mean(drops.values()),
        worst_task=drops[worst],
        worst=worst,
        regret_half=mean_known(halves[h]["regret_half"] for h in HALVES),
        regret_double=mean_known(halves[h]["regret_double"] for h in HALVES),
        edge=several and any(halves[h]["edge"] for h in HALVES),
        tasks=tasks,
        by_half={h: mean(halves[h]["score"].values()) for h in HALVES},
        discarded_energy=float(scores.get("discarded_energy") or 0.0),
        variant=unit.variant,
    )


def best_by_half(rows: Sequence[Row], arm: str) -> dict[str, str]:
    """Choose an arm's best merge for each half that is reported, as the other half sees it, over all seeds."""
    mine = [r for r in rows if r.arm == arm and not r.variant]
    methods = sorted({r.method for r in mine})

    def best(half: str) -> str:
        return max(methods, key=lambda m: mean(r.selected[half] for r in mine if r.method == m))

    return {half: best(half) for half in HALVES}


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """What a merge is measured against, for one seed.

    Args:
        reference: Kind: served separately, best single adapter, joint training, or a merge and its repair.
        arm, seed: Coordinates.
        score: Mean over tasks, percent.
        recovered: Of plain; NaN where the plain arm has learned nothing.
        tasks: Task -> score.
    """

    reference: str
    arm: str
    seed: int
    score: float
    recovered: float
    tasks: Mapping[str, float]


def references(layout: Layout) -> list[ReferenceRow]:
    """Read what a merge is measured against: adapters served apart, joint training, the best single adapter, repair."""
    rows: list[ReferenceRow] = []
    for seed in layout.recipe.seeds:
        ends = reference(layout, seed)
        rows.append(_reference("served separately", ends.arm, seed, ends.alone, ends))
        for arm in plain_arms(layout):
            scores = _best_single(result(layout, alone_unit(arm.name, chosen(layout, arm), seed)))
            rows += [_reference("best single adapter", arm.name, seed, scores, ends)] if scores else []
        for arm in (a for a in layout.recipe.arm_specs if a.joint):
            scores = task_means(result(layout, alone_unit(arm.name, chosen(layout, arm), seed)), "alone")
            rows.append(_reference("joint training", arm.name, seed, scores, ends))
    for unit in repair_units(layout):
        scores = task_means(result(layout, replace(unit, stage=REPAIRED, split=FOLDS)), "alone")
        rows.append(_reference(f"{unit.merge} and repair", unit.arm, unit.seed, scores, reference(layout, unit.seed)))
    return rows


def _reference(kind: str, arm: str, seed: int, scores: Mapping[str, float], ends: Ends) -> ReferenceRow:
    score = mean(scores.values())
    return ReferenceRow(kind, arm, seed, score, recovered(score, *ends.over(scores)), dict(scores))


def _best_single(scores: Mapping[str, Any]) -> dict[str, float]:
    """Score the one adapter that does all tasks best (with each task's own head), chosen on one half, reported on the other."""
    parts: dict[str, list[float]] = {}
    for chosen_on, reported in zip(HALVES, reversed(HALVES), strict=True):
        names = scores[chosen_on].get("crossed", {})
        if names:
            best = max(names, key=lambda n: mean(names[n].values()))
            for task, value in scores[reported]["crossed"][best].items():
                parts.setdefault(task, []).append(value)
    return {t: mean(v) for t, v in parts.items()}
