"""How each kind of unit is done: read, compute, write; training units many at once, as a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.adapters.tensor_file import write_tensors
from plait.collecting import collect_task
from plait.initial import InitialSettings, completion_note, initial_adapters
from plait.report.summary import PLAIN
from plait.session import Session
from plait.statistics import Statistics, read_statistics, write_statistics
from plait.store import staged_folder
from plait.study.features import features, task_vector_norm
from plait.study.scoring import Answers, Scorer, cross_fitted, tuned
from plait.study.splits import HALVES, Split, split_rows
from plait.study.units import ALONE, FEATURES, MERGE, REPAIR, REPAIRED, STATISTICS, TRAIN, TUNING, Layout, Unit
from plait.training import Member, train_fleet
from plait.training.peft_model import TASK_TYPES

ANSWERS_FILE = "answers.safetensors"
_BACKGROUND = "background."  # prefix of the files of tasks that only lend their statistics
Told = Callable[[str], None]
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
    done = len(trainings)
    others = [u for u in units if u.stage not in (TRAIN, REPAIR)]
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
                    merges[j] = ahead.submit(_merged, others[j], layout.of(others[j]))
            _one(unit, layout.of(unit), merges.pop(i, None))
            done += 1
        for future in merges.values():
            future.cancel()
    return done


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
    sessions = [(layout.session, "")] + ([(layout.background, _BACKGROUND)] if layout.study.background else [])
    spec = layout.study.statistics.model_copy(update={"pool": unit.pool, "samples": unit.samples})
    for whole, prefix in sessions:
        session = Session(whole.recipe.model_copy(update={"statistics": spec}), whole)
        for name, task in session.tasks.items():
            found = collect_task(session, task, session.sample(name, unit.seed), parts=folder / "parts")
            write_statistics(folder / f"{prefix}{name}.stats.safetensors", found, identity=layout.wanted(unit))
            result[prefix + name] = {"tokens": max(m.count for m in found.sites.values())}


def statistics_of(unit: Unit, layout: Layout) -> tuple[dict[str, Statistics], list[Statistics]]:
    """Statistics by task, and those of the background, that a unit reads."""
    source = layout.statistics_unit(unit)

    def read() -> tuple[dict[str, Statistics], list[Statistics]]:
        folder = layout.path(source)
        found = {t: read_statistics(folder / f"{t}.stats.safetensors") for t in layout.session.tasks}
        pool = sorted(folder.glob(f"{_BACKGROUND}*.stats.safetensors"))
        return found, [read_statistics(p) for p in pool]

    return layout.cached(layout.path(source), read)


# --- training ---------------------------------------------------------------------------------------------------------


def train(units: Sequence[Unit], layout: Layout, tell: Told = lambda text: None) -> None:
    """Train the adapters of several units together; members that are done already are left alone."""
    members: list[Member] = []

    def alike(unit: Unit) -> tuple[str, str, int]:
        here = layout.of(unit)
        return here.key(here.statistics_unit(unit)), unit.arm, unit.seed

    for unit in sorted(units, key=alike):
        here = layout.of(unit)
        members += _repairs(unit, here) if unit.stage == REPAIR else _members(unit, here)
    rows = {f"{m.initial.name}, seed {m.seed}": m.initial.source.get("completed") for m in members}
    for name, found in rows.items():
        if found:
            tell(f"warning: {completion_note(name, found)}")
    tell(f"{len(members)} adapters are ready to be trained")
    train_fleet(members, layout.session.base)


def _members(unit: Unit, layout: Layout) -> list[Member]:
    settings = layout.settings(unit)
    if settings.tied:
        settings = replace(settings, tied=layout.key(unit))
    statistics, background = statistics_of(unit, layout)
    initial = _initial(unit, layout, statistics, background)
    constrained = statistics if settings.constraint not in ("free", "frozen") else None
    return [_member(unit, layout, t, initial[t], settings, constrained) for t in layout.session.tasks]


def _member(
    unit: Unit, layout: Layout, task: str, initial: Adapter, settings: Any, statistics: dict[str, Statistics] | None
) -> Member:
    session = layout.session
    out, wanted = layout.path(unit) / task, layout.wanted(unit, task)
    return Member(
        initial, session.tasks[task], session.training(task, unit.seed), settings, unit.seed, out, wanted, statistics
    )


def _initial(
    unit: Unit, layout: Layout, statistics: dict[str, Statistics], background: list[Statistics]
) -> dict[str, Adapter]:
    """Initial adapters of an arm and seed; arms that differ in training alone, and all rates, share them."""
    arm = layout.study.arm(unit.arm)
    start = [str(getattr(arm, k)) for k in ("method", "row_norm", "options", "rank", "known", "background", "joint")]
    key = (layout.path(layout.statistics_unit(unit)), unit.seed, *start, str(layout.study.lora))
    return layout.cached(key, lambda: _made(unit, layout, statistics, background))


def _made(
    unit: Unit, layout: Layout, statistics: dict[str, Statistics], background: list[Statistics]
) -> dict[str, Adapter]:
    arm, recipe = layout.study.arm(unit.arm), layout.study
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
    if arm.known is not None:
        found = {}
        for i, task in enumerate(names):
            known = [names[(i + k) % len(names)] for k in range(arm.known + 1)]
            found |= initial_adapters({n: statistics[n] for n in known}, settings, tasks=[task], **common)
    elif arm.joint:
        first = initial_adapters(statistics, settings, tasks=names[:1], **common)[names[0]]
        found = dict.fromkeys(names, first)
    else:
        found = initial_adapters(statistics, settings, **common)
    return {task: adapter for task, (adapter, _) in found.items()}


def _repairs(unit: Unit, layout: Layout) -> list[Member]:
    """A merge, with every task's head, trained on all tasks together: the factors tied, the heads apart."""
    repair = layout.study.repair
    settings = replace(
        layout.settings(unit), steps=repair.steps if repair else 0, epochs=None, snapshots=(), constraint="free"
    )
    settings = replace(settings, constraint_options={}, tied=layout.key(unit))
    merged = _merged(replace(unit, stage=MERGE), layout)
    modules = {m: replace(f, B=f.B * (f.scaling * unit.scale), scaling=1.0) for m, f in merged.modules.items()}
    start = replace(merged, modules=modules)
    heads = {t: a.heads.get(t, {}) for t, a in adapters_of(replace(unit, stage=MERGE), layout).items()}
    return [
        _member(unit, layout, t, replace(start, name=t, heads={t: heads[t]} if heads[t] else {}), settings, None)
        for t in layout.session.tasks
    ]


# --- merges and scores ------------------------------------------------------------------------------------------------


def adapters_of(unit: Unit, layout: Layout) -> dict[str, Adapter]:
    """Task -> the trained adapter a unit is about, at the moment it is about."""
    repaired = unit.stage == REPAIRED
    root = layout.path(replace(unit, stage=REPAIR, split="") if repaired else layout.trained_by(unit))
    tail = Path("steps") / f"{unit.step:06d}" if unit.step and not repaired else Path()

    def read() -> dict[str, Adapter]:
        return {t: read_adapter(root / t / tail, name=t) for t in layout.session.tasks}

    return layout.cached(root / tail, read)


def _merged(unit: Unit, layout: Layout) -> Adapter:
    from plait.merging import merge
    from plait.merging.registry import find_method

    spec = next(m for m in layout.study.merge_specs if m.name == unit.merge)
    adapters = list(adapters_of(unit, layout).values())
    statistics = statistics_of(unit, layout)[0] if find_method(spec.merge_method).needs else None
    made = merge(
        adapters,
        spec.merge_method,
        options=spec.options,
        calibrate=spec.calibrate,
        rank=spec.rank,
        statistics=statistics,
        seed=unit.seed,
        verify=False,
        name=spec.name,
    )
    return replace(made.adapter, source={"discarded_energy": made.record.get("discarded_energy", 0.0)})


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
            if part != "tuning" and unit.arm in PLAIN and unit.stage == ALONE:  # for the best single adapter
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
