"""The trainings of a study, many units as one fleet: what each starts from, and which went astray."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.border.checked import Json
from plait.border.counts import plural
from plait.disk.store import staged_folder
from plait.errors import Diverged, RunError
from plait.model.base import BaseModel
from plait.runs.base_weights import base_weights
from plait.runs.layout import Layout
from plait.runs.output_gradients import with_curvature
from plait.runs.pending import cost
from plait.runs.reporting import Report
from plait.runs.sources import adapters_of, diverged, merged_of, statistics_of
from plait.runs.units import DIVERGED, MERGE, REPAIR, Unit
from plait.runs.waves import final_units, repair_units, sweep_units
from plait.statistics import Statistics
from plait.subspaces.start import InitialSettings, completion_note, initial_adapters
from plait.training import Member, train_fleet, train_member
from plait.training.fleet_state import fleets_in
from plait.training.peft_model import TASK_TYPES


def train(units: Sequence[Unit], layout: Layout, report: Report) -> None:
    """Train the adapters of several units; those that are done already are left alone.

    Where a loss of the sweep leaves the numbers, that is what the sweep asked of its rate: the adapter's folder says so, and
    counts as done; so do its scores. To have it tried again, remove both.

    Args:
        units: Trainings and repairs.
        layout: Where they lie.
        report: Hears what begins and how far it is.

    Raises:
        Diverged: A loss that is not of the sweep left the numbers: what is to be reported is missing.
    """
    by_base: dict[BaseModel, list[Unit]] = {}
    for unit in [*units, *_written_beside(units, layout)]:  # a variant may have a base of its own
        by_base.setdefault(layout.of(unit).session.base, []).append(unit)
    for base, own in by_base.items():
        _train_on(base, own, layout, report)


def _written_beside(units: Sequence[Unit], layout: Layout) -> list[Unit]:
    """Units that are done, in whose fleet some of these units were, when it was ended while it wrote: it goes on as a whole."""
    wanted = {layout.of(u).path(u).absolute() for u in units}
    swept = sweep_units(layout)
    others = list(swept)
    if not any(u in swept for u in units):
        with contextlib.suppress(
            RunError
        ):  # trained at a rate that no sweep has chosen: what else is reported is not known
            others = [*final_units(layout), *repair_units(layout)]
    known = {layout.of(u).path(u).absolute(): u for u in dict.fromkeys(others)}
    beside: set[Path] = set()
    for _, recorded in fleets_in({*known, *wanted}):
        folders = {Path(out).parent for out in recorded}
        beside |= folders - wanted if folders & wanted else set()
    found = [known[folder] for folder in sorted(beside & known.keys())]
    return [u for u in found if layout.of(u).done(u) and layout.of(u).done(layout.of(u).statistics_unit(u))]


def _train_on(base: BaseModel, units: Sequence[Unit], layout: Layout, report: Report) -> None:
    """`train` of units of one base."""
    members: list[Member] = []

    def alike(unit: Unit) -> tuple[str, str, int]:
        here = layout.of(unit)
        return here.key(here.statistics_unit(unit)), unit.arm, unit.seed

    for unit in sorted(units, key=alike):
        here = layout.of(unit)
        members += _repairs(unit, here) if unit.stage == REPAIR else members_of(unit, here)
    for name, rows in {f"{m.initial.name}, seed {m.seed}": m.initial.source.get("completed") for m in members}.items():
        if rows:
            report.note(f"warning: {completion_note(name, rows)}")
    members = [m for m in members if not diverged(m.out)]
    try:
        todo = [u for u in units if not layout.of(u).done(u)]
        _train(members, base, layout, report, sum(cost(u, layout) for u in todo), len(todo))
    except Diverged as e:
        swept = {layout.path(u) for u in sweep_units(layout)}
        lost = [m for m in members if str(m.out) in e.lost]
        for m in (m for m in lost if m.out.parent in swept):
            with staged_folder(m.out, m.identity, result={DIVERGED: e.lost[str(m.out)]}):
                report.note(f"diverged: {m.task.name}, lr {m.settings.lr:g}: {e.lost[str(m.out)]}")
        if not lost or any(m.out.parent not in swept for m in lost):
            raise


def _train(members: Sequence[Member], base: BaseModel, layout: Layout, report: Report, cost: float, units: int) -> None:
    """Train members as a fleet, or one by one where they stand on their own and no fleet is wanted."""
    if layout.overwrite:  # of these, what matches is kept, as everywhere
        todo = [m for m in members if not layout.is_whole(m.out, m.identity)]
        ties = {m.settings.tied for m in todo} - {None}
        members = [m for m in members if m.settings.tied in ties or any(m is one for one in todo)]
    if layout.trains_together or any(m.settings.tied for m in members):
        report.begin(f"training {plural(len(members), 'adapter')} together", cost, units)
        train_fleet(members, base, overwrite=layout.overwrite, progress=report.within)
        return
    for i, member in enumerate(members):
        if not layout.is_whole(member.out, member.identity):
            label = f"train {'/'.join(member.out.parts[-3:])}"
            report.begin(
                label, cost / len(members), int((i + 1) * units / len(members)) - int(i * units / len(members))
            )
            train_member(member, base, overwrite=layout.overwrite, progress=report.within)


def members_of(unit: Unit, layout: Layout) -> list[Member]:
    """Give what a training unit trains: for each task where its adapter starts, rows, settings, and the statistics of its constraint.

    Args:
        unit: A training; its statistics lie in the layout already.
        layout: Where they lie.

    Returns:
        One member a task, in the order of the recipe.
    """
    settings = layout.settings(unit)
    if settings.tied:
        settings = replace(settings, tied=layout.key(unit))
    statistics, background = statistics_of(unit, layout)
    initial = _initial(unit, layout, statistics, background)
    constrained = statistics if settings.constraint not in ("free", "frozen") else None
    if constrained and settings.constraint_options.get("curvature"):
        key = (layout.path(layout.statistics_unit(unit)), "curvature")
        constrained = layout.cached(key, lambda: with_curvature(statistics, layout.session, unit.seed))
    return [_member(unit, layout, t, initial[t], settings, constrained) for t in layout.session.tasks]


def _member(
    unit: Unit, layout: Layout, task: str, initial: Adapter, settings: Any, statistics: dict[str, Statistics] | None
) -> Member:
    session = layout.session
    out, wanted = layout.path(unit) / task, layout.wanted(unit, task)
    return Member(
        initial,
        session.tasks[task],
        session.training(task, unit.seed),
        settings,
        unit.seed,
        out,
        wanted,
        statistics,
        session.selection(task, unit.seed) if settings.evaluate_every else None,
    )


def _initial(
    unit: Unit, layout: Layout, statistics: dict[str, Statistics], background: list[Statistics]
) -> dict[str, Adapter]:
    """Initial adapters of an arm and seed; arms that differ in training alone, and all rates, share them."""
    arm = layout.recipe.arm(unit.arm)
    start = [str(getattr(arm, k)) for k in ("method", "row_norm", "options", "rank", "known", "background", "joint")]
    key = (layout.path(layout.statistics_unit(unit)), unit.seed, *start, str(layout.recipe.lora))
    return layout.cached(key, lambda: _made(unit, layout, statistics, background))


def _made(
    unit: Unit, layout: Layout, statistics: dict[str, Statistics], background: list[Statistics]
) -> dict[str, Adapter]:
    arm, recipe = layout.recipe.arm(unit.arm), layout.recipe
    rank = arm.rank or recipe.lora.rank
    settings = InitialSettings(
        arm.method,
        rank,
        recipe.lora.alpha * rank / recipe.lora.rank,  # the scaling stays what it is
        arm.row_norm,
        arm.options,
        arm.background,
        TASK_TYPES[next(iter(layout.session.tasks.values())).kind],
        recipe.lora.recorded_targets,
    )
    common: dict[str, Any] = {"base": recipe.base.model, "revision": recipe.base.revision, "seed": unit.seed}
    common |= {"background": background if arm.background else (), "device": layout.session.base.torch_device}
    names = list(statistics)
    common["weights"] = base_weights(layout.session.base, statistics[names[0]])
    if arm.known is not None:
        starts: dict[str, tuple[Adapter, Json]] = {}
        for i, task in enumerate(names):
            known = [names[(i + k) % len(names)] for k in range(arm.known + 1)]
            starts |= initial_adapters({n: statistics[n] for n in known}, settings, tasks=[task], **common)
    elif arm.joint:
        first = initial_adapters(statistics, settings, tasks=names[:1], **common)[names[0]]
        starts = dict.fromkeys(names, first)
    else:
        starts = initial_adapters(statistics, settings, **common)
    return {task: adapter for task, (adapter, _) in starts.items()}


def _repairs(unit: Unit, layout: Layout) -> list[Member]:
    """A merge, with every task's head, trained on all tasks together: the factors tied, the heads apart."""
    repair = layout.recipe.repair
    settings = replace(
        layout.settings(unit), steps=repair.steps if repair else 0, epochs=None, snapshots=(), constraint="free"
    )
    settings = replace(settings, constraint_options={}, tied=layout.key(unit))
    merged = merged_of(replace(unit, stage=MERGE), layout).adapter
    modules = {m: replace(f, B=f.B * (f.scaling * unit.scale), scaling=1.0) for m, f in merged.modules.items()}
    start = replace(merged, modules=modules)
    heads = {t: a.heads.get(t, {}) for t, a in adapters_of(replace(unit, stage=MERGE), layout).items()}
    return [
        _member(unit, layout, t, replace(start, name=t, heads={t: heads[t]} if heads[t] else {}), settings, None)
        for t in layout.session.tasks
    ]
