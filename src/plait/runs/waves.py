"""The order of a recipe: waves of units, each needing only what earlier waves have left on disk.

Every arm first settles on a learning rate and a moment of its training: a plain recipe names them, a tuned one (a study) sweeps rates
on rows of their own and takes what its merges like best. Then follow the trainings and scores that are reported, at all seeds; the
ablations, at the rates of the arms they vary; and what is measured beside them, such as a merge that is trained further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from plait.border.checked import Json
from plait.border.counts import agreed, plural
from plait.disk.manifest import MANIFEST
from plait.disk.store import read_manifest
from plait.errors import RunError
from plait.recipes.sections import ArmSpec
from plait.runs.layout import Layout
from plait.runs.pending import pending
from plait.runs.unit_records import unit_result
from plait.runs.units import ALONE, DIVERGED, FEATURES, FOLDS, MERGE, REPAIR, REPAIRED, TRAIN, TUNING, Unit

SWEEP_WAVES = 3  # statistics, trainings and scores of the sweep: what comes after depends on what it finds


@dataclass(frozen=True, slots=True)
class Choice:
    """A learning rate and a moment (0: the end)."""

    rate: float
    step: int


def next_wave(layout: Layout) -> tuple[str, list[Unit]]:
    """The first wave with units that are not done, and those units; ("", []) where everything is done."""
    for name, units in waves(layout):
        if todo := pending(layout, units):
            return name, todo
    return "", []


def all_units(layout: Layout) -> list[Unit]:
    """Every unit of a finished recipe. Statistics and adapters may be gone, and what only the predictors read may be missing.

    Raises:
        RunError: It is not finished.
    """
    run_units: list[Unit] = []
    for name, units in waves(layout):
        if todo := [u for u in pending(layout, units) if u.stage in (ALONE, MERGE, REPAIRED)]:
            text = f"the run is not finished: {plural(len(todo), 'unit')} of wave {name!r} {agreed(len(todo), 'is', 'are')} open"
            raise RunError(text, where=str(layout.out))
        run_units += units
    return run_units


def waves(layout: Layout) -> Iterator[tuple[str, list[Unit]]]:
    """Waves in order; a wave is worked out only once the ones before it are done.

    A study makes statistics and adapters for what is still open: once everything that reads them is scored they may be deleted.
    Those of a plain recipe are results like all others.
    """
    if layout.recipe.tuned:
        swept = {t: tuning_scores(layout, t) for t in sweep_units(layout)}
        needed = _read_by(layout, swept)
        yield "statistics of the sweep", _statistics(layout, needed)
        yield "training of the sweep", needed
        yield "scores of the sweep", [u for scores in swept.values() for u in scores]
    final = {t: fold_scores(layout, t) for t in final_units(layout)}
    repaired = {u: replace(u, stage=REPAIRED, split=FOLDS) for u in repair_units(layout)}
    starts = {replace(u, stage=TRAIN, merge="", scale=0.0): [r] for u, r in repaired.items()}
    needed = list(final)
    if layout.recipe.tuned:
        needed = _read_by(layout, {t: [*scores, *starts.get(t, [])] for t, scores in final.items()})
    yield "statistics", _statistics(layout, needed)
    yield "training", list(dict.fromkeys(layout.of(u).trained_by(u) for u in needed))
    yield "scores", [u for scores in final.values() for u in scores]
    yield "repair", _read_by(layout, {u: [r] for u, r in repaired.items()}) if layout.recipe.tuned else list(repaired)
    yield "scores of the repaired", list(repaired.values())


def _read_by(layout: Layout, readers: Mapping[Unit, Sequence[Unit]]) -> list[Unit]:
    """Units some reader of which is not done."""
    return [u for u, scores in readers.items() if pending(layout, scores)]


def _statistics(layout: Layout, units: Sequence[Unit]) -> list[Unit]:
    """What training starts from, and what merges read."""
    sources = []
    for u in units:
        here = layout.of(u)
        sources += [here.statistics_unit(u), here.statistics_unit(replace(u, stage=MERGE))]
    return list(dict.fromkeys(sources))


# --- the sweep --------------------------------------------------------------------------------------------------------


def sweep_units(layout: Layout) -> list[Unit]:
    """One training per arm and rate, at the tuning seed; none where rates are not tuned."""
    recipe = layout.recipe
    arms = [a for a in recipe.arm_specs if a.like is None]
    return [Unit(TRAIN, recipe.tuning_seed, a.name, rate) for a in arms for rate in a.rates or recipe.rates or ()]


def tuning_scores(layout: Layout, trained: Unit) -> list[Unit]:
    """Every moment of a training, alone and merged, on the tuning rows."""
    arm = layout.recipe.arm(trained.arm)
    scores = []
    for step in layout.moments(arm):
        alone = replace(trained, stage=ALONE, step=step, split=TUNING)
        scores.append(alone)
        if not arm.joint:
            scores += [replace(alone, stage=MERGE, merge=m) for m in tuning_merges(layout)]
    return scores


def tuning_merges(layout: Layout) -> list[str]:
    """Merges by the best of which an arm's rate is chosen."""
    return layout.recipe.tuning_merges or [m.name for m in layout.recipe.merge_specs]


def result(layout: Layout, unit: Unit) -> Json:
    """What a unit has left in its manifest, every number looked at (`unit_result`)."""
    here = layout.of(unit)
    if ("result", unit) not in here.known:
        path = here.path(unit)
        manifest = read_manifest(path)
        if manifest is None:
            raise RunError("a unit is not done", where=unit.label)
        here.known["result", unit] = unit_result(dict(manifest), unit, tuple(here.tasks), str(path / MANIFEST))
    return here.known["result", unit]  # type: ignore[no-any-return]


def swept(layout: Layout, arm: ArmSpec) -> list[dict[str, Any]]:
    """What the sweep saw of an arm: rate, step, alone, delta norm, score and scale of each merge; percent.

    Of a training that diverged, of which no moment counts: None and nothing merged, and under `diverged` what happened.
    """
    rows = []
    for trained in (u for u in sweep_units(layout) if u.arm == arm.name):
        for step in layout.moments(arm):
            alone = replace(trained, stage=ALONE, step=step, split=TUNING)
            scores = result(layout, alone)
            row: dict[str, Any] = {"arm": arm.name, "lr": trained.rate, "step": step}
            if DIVERGED in scores:
                empty = {"alone": None, "delta_norm": None, "merged": {}, "scale": {}, DIVERGED: scores[DIVERGED]}
                rows.append(row | empty)
                continue
            merges = (
                {}
                if arm.joint
                else {m: result(layout, replace(alone, stage=MERGE, merge=m)) for m in tuning_merges(layout)}
            )
            rows.append(
                row
                | {
                    "alone": float(np.mean(list(scores["tuning"]["alone"].values()))),
                    "delta_norm": float(np.mean(list(scores["delta_norm"].values()))),
                    "merged": {m: r["score"] for m, r in merges.items()},
                    "scale": {m: r["scale"] for m, r in merges.items()},
                }
            )
    return rows


def learned(layout: Layout, arm: ArmSpec) -> list[dict[str, Any]]:
    """What the sweep saw of an arm, without rates that diverged: what may be chosen.

    Raises:
        RunError: There is nothing else.
    """
    rows = [r for r in swept(layout, arm) if DIVERGED not in r]
    if not rows:
        raise RunError("every rate of the sweep diverged", where=f"arm {arm.name}", hint="give it lower rates")
    return rows


def chosen(layout: Layout, arm: ArmSpec) -> Choice:
    """The rate and moment of an arm: those with the best merge on the tuning rows; for a joint arm the best alone.

    Of an arm that is like another, the other's; of one that is a moment of another, that moment.
    """
    if arm.like is not None:
        other = chosen(layout, layout.recipe.arm(arm.like))
        return Choice(other.rate, arm.snapshot or other.step)
    if not layout.recipe.tuned:
        return Choice(layout.recipe.training_of(arm).lr, 0)
    rows = learned(layout, arm)
    best = max(rows, key=lambda r: r["alone"] if arm.joint else max(r["merged"].values()))
    return Choice(best["lr"], best["step"])


def chosen_alone(layout: Layout, arm: ArmSpec) -> Choice:
    """The rate and moment at which an arm's adapters are best alone."""
    if not layout.recipe.tuned:
        return chosen(layout, arm)
    best = max(learned(layout, arm), key=lambda r: r["alone"])
    return Choice(best["lr"], best["step"])


def plain_arms(layout: Layout) -> list[ArmSpec]:
    """The arms that people without plait use."""
    return [a for a in layout.recipe.arm_specs if a.is_plain]


# --- what is reported -------------------------------------------------------------------------------------------------


def final_units(layout: Layout) -> list[Unit]:
    """Trainings that are reported: each arm at its choice, plain arms also at their best alone, and the variants'."""
    recipe = layout.recipe
    trainings = []
    for arm in recipe.arm_specs:
        choices = [chosen(layout, arm)] + ([chosen_alone(layout, arm)] if arm in plain_arms(layout) else [])
        for choice in dict.fromkeys(choices):
            trainings += [Unit(TRAIN, s, arm.name, choice.rate, choice.step) for s in arm.seeds or recipe.seeds]
    for variant in recipe.variants:
        for name in variant.arms:
            choice = chosen(layout, recipe.arm(name))
            seeds = variant.seeds or recipe.seeds[:1]
            trainings += [Unit(TRAIN, s, name, choice.rate, choice.step, variant=variant.name) for s in seeds]
    return trainings


def fold_scores(layout: Layout, trained: Unit) -> list[Unit]:
    """Everything that is scored of a reported training."""
    recipe = layout.of(trained).recipe
    arm = recipe.arm(trained.arm)
    alone = replace(trained, stage=ALONE, split=FOLDS)
    if arm.joint:
        return [alone]
    best = chosen(layout, layout.recipe.arm(trained.arm))
    merges = [replace(alone, stage=MERGE, merge=m.name) for m in recipe.merge_specs]
    reported = (trained.rate, trained.step) == (best.rate, best.step)
    return [
        alone,
        *(merges if reported else []),
        *([replace(alone, stage=FEATURES)] if not trained.variant and len(recipe.tasks) > 1 else []),
    ]


def repair_units(layout: Layout) -> list[Unit]:
    """Merges that are trained further; their scale is the sweep's, so that no reported row has a say in it."""
    repair = layout.recipe.repair
    repairs = []
    for name in repair.arms if repair else []:
        arm = layout.recipe.arm(name)
        choice = chosen(layout, arm)
        scale = 1.0  # a plain recipe has no rows to choose it by
        if repair and layout.recipe.tuned:
            row = next(r for r in swept(layout, arm) if (r["lr"], r["step"]) == (choice.rate, choice.step))
            scale = row["scale"][repair.merge]
        for seed in arm.seeds or layout.recipe.seeds:
            repairs.append(
                Unit(REPAIR, seed, name, choice.rate, choice.step, repair.merge if repair else "", scale=scale)
            )
    return repairs
