"""A recipe from its file to its results: wave after wave through an executor, resumed where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.border.counts import agreed, plural
from plait.disk.locks import locked
from plait.disk.overwriting import require_replaceable
from plait.disk.store import staged_file
from plait.errors import RunError, UsageError
from plait.model.base import emulated
from plait.progress import Progress, duration
from plait.recipes.recipe import Recipe
from plait.runs.best import write_best
from plait.runs.executors import Executor, InProcess, batch_of, mender
from plait.runs.folder import PRODUCTS, is_begun, is_earlier, keep, keeps
from plait.runs.journal import noted
from plait.runs.layout import Layout
from plait.runs.lengths import say
from plait.runs.pending import cost, pending
from plait.runs.reporting import Report, Shown
from plait.runs.session import require_one_form
from plait.runs.stages import parts_of
from plait.runs.units import MERGE, REPAIR, STATISTICS, TRAIN, Unit
from plait.runs.waves import SWEEP_WAVES, next_wave, waves

BATCHES_PER_SCORER = 4  # for each process that scores: batches take unlike times, and the tail should be short


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a run has come.

    Args:
        finished: Whether nothing is left.
        wave: The wave that is at work; "" for none.
        left: How many of its units are not done.
        done: How many units were done.
        reused: How many were there already.
        seconds: What it took.
    """

    finished: bool
    wave: str
    left: int
    done: int
    reused: int
    seconds: float


def run(
    recipe: Recipe,
    out: Path,
    *,
    executor: Executor | None = None,
    layout: Layout | None = None,
    seconds: float | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Do what a recipe still lacks, and write its best merge as an adapter folder.

    Args:
        recipe: The recipe.
        out: Its folder; an unfinished run there is resumed.
        executor: Where units run; in this process by default.
        layout: Of the recipe, where the executor has one.
        seconds: Time after which no unit is begun; the next call resumes the run.
        overwrite: Redo units whose place holds the result of other settings (results that match are always kept). One that
            is damaged is done again in any case, with a line on stderr that says so.
        quiet: No progress on stderr.

    Raises:
        UsageError: `out` holds results of other settings; nothing was changed.
        EnvironmentFault: Another process is at work on `out`.
    """
    started = time.monotonic()
    layout = layout or Layout(recipe, out)
    layout.overwrite = overwrite and not recipe.tuned  # results that are addressed by content never stand in the way
    executor = executor or InProcess(layout)
    require_sound(layout)
    if not overwrite:
        require_current(out)
    begun = is_begun(out)
    if overwrite and not begun:  # nothing in it is known to be ours
        for place in (*(layout.of(u).path(u) for u in planned(layout)), *(out / name for name in PRODUCTS)):
            require_replaceable(place)
    layout.mend = overlook if begun else None  # a folder that was never begun holds nothing that is ours to mend
    todo = pending(layout, planned(layout))
    reused = len(planned(layout)) - len(todo)
    progress = Progress(sum(cost(u, layout) for u in todo), len(todo), quiet)
    if todo:
        say(layout.cuts, layout.session.tasks)
    if todo and (slow := emulated(layout.session.base)):
        progress.close(slow)
    report = Shown(progress)
    layout.mend = layout.mend and mender(report)
    done = 0
    if todo or not keeps(recipe, out):
        device = layout.session.base.torch_device.type
        names = (type(executor).__name__, executor.workers, executor.scorers)
        with locked(out, doing="plait run"), noted(out, device, *names):
            layout.mend = mender(report)
            keep(layout)
            done = _work(layout, executor, report, None if seconds is None else started + seconds)
            _clear_leftovers(layout)
    name, left = next_wave(layout)
    if not left:
        write_best(layout)
    spent = time.monotonic() - started
    progress.close(f"{plural(done, 'unit')} done, {reused} reused, {duration(spent)}")
    return Outcome(not left, name, len(left), done, reused, round(spent, 2))


def _work(layout: Layout, executor: Executor, report: Shown, until: float | None) -> int:
    """Do wave after wave until nothing is left or the time is over; returns how many units were done."""
    done, clock = 0, None if until is None else time.time() + until - time.monotonic()
    while until is None or time.monotonic() < until:
        name, todo = next_wave(layout)
        if not todo:
            break
        if layout.recipe.tuned:  # what later waves hold is only known after this one
            report.progress = Progress(sum(cost(u, layout) for u in todo), len(todo), report.progress.quiet)
        batches = [batch_of(layout, part, clock) for part in parts(todo, _batches(todo, executor))]
        executor.run(batches, report)
        report.progress.finish()
        left = len(pending(layout, todo))
        done += len(todo) - left
        if left and (until is None or time.monotonic() < until):
            raise RunError(
                f"{plural(left, 'unit')} of wave {name!r} {agreed(left, 'was', 'were')} not done", where=str(layout.out)
            )
    return done


def overlook(path: Path, fault: Exception) -> None:
    """Take a damaged result as missing for now; it is mended once the folder is held."""


def planned(layout: Layout) -> list[Unit]:
    """Units of all waves that can be worked out by now: of a study that is not swept yet the sweep, else all."""
    units: list[Unit] = []
    for number, (_, wave) in enumerate(waves(layout), start=1):
        units += wave
        if layout.recipe.tuned and number == SWEEP_WAVES and pending(layout, units):
            break
    return list(dict.fromkeys(units))


def require_current(out: Path) -> None:
    """Refuse the folder of a run of an earlier version.

    Raises:
        UsageError: It is one.
    """
    if is_earlier(out):
        hint = "choose another --out, or --overwrite to make it anew"
        raise UsageError("a run of an earlier version of plait", where=str(out), hint=hint)


def require_sound(layout: Layout) -> None:
    """Refuse, before anything is computed, what no run can do.

    Raises:
        UsageError: Tasks of different forms, or a snapshot after the end of its training.
    """
    session, recipe = layout.session, layout.recipe
    require_one_form(session)
    for arm in (a for a in recipe.arm_specs if a.snapshot):
        for task in session.tasks:
            settings = replace(recipe.training_of(arm), snapshots=(arm.snapshot or 0,))
            settings.require_snapshots(len(session.training(task, recipe.seeds[0])), task)


@dataclass(frozen=True, slots=True)
class Jobs:
    """The next wave as job files.

    Args:
        wave: Its name; "" where the run is finished.
        jobs: Paths of the files. The next wave's can be written once these are done.
    """

    wave: str
    jobs: tuple[str, ...]


def write_jobs(recipe: Recipe, out: Path, to: Path, workers: int) -> Jobs:
    """Write the open units of the next wave as job files for `plait job run`, one per worker."""
    layout = Layout(recipe, out, mend=mender(Report()) if is_begun(out) else None)
    require_sound(layout)
    require_current(out)
    name, todo = next_wave(layout)
    keep(layout)
    made = []
    for i, part in enumerate(parts(todo, workers) if todo else []):
        path = to / f"job-{i:03d}.json"
        with staged_file(path, overwrite=True) as stage:
            stage.write_text(json.dumps(batch_of(layout, part)), encoding="utf-8")
        made.append(str(path))
    return Jobs(name, tuple(made))


def parts(units: Sequence[Unit], workers: int) -> list[list[Unit]]:
    """Units in batches for the workers, about equal: what concerns one seed, and one training, stays together."""
    groups: dict[Any, list[Unit]] = {}
    for u in sorted(units, key=lambda u: (u.variant, u.seed)):
        key = u if u.stage in (TRAIN, REPAIR) else (u.variant, u.arm, u.rate, u.step, u.seed)
        groups.setdefault(key, []).append(u)
    share = _weight(units) / min(workers, len(groups))
    dealt: list[list[Unit]] = [[]]
    for group in groups.values():
        if dealt[-1] and sum(_weight(p) for p in dealt) + _weight(group) / 2 > share * len(dealt):
            dealt.append([])
        dealt[-1] += group
    return dealt


def _batches(units: Sequence[Unit], executor: Executor) -> int:
    """How many batches: a fleet is best whole, so one for each worker; of scores several for each, for a short tail."""
    return executor.workers if units[0].stage in (TRAIN, REPAIR) else BATCHES_PER_SCORER * executor.scorers


def _weight(units: Sequence[Unit]) -> int:
    return sum(4 if u.stage == MERGE else 1 for u in units)


def _clear_leftovers(layout: Layout) -> None:
    """Remove what a run that was killed just after a rename has left: checkpoints of adapters, single files of statistics."""
    from plait.training.checkpoints import checkpoint_root

    for unit in (u for u in planned(layout) if u.stage == STATISTICS and layout.of(u).done(u)):
        shutil.rmtree(parts_of(unit, layout.of(unit)), ignore_errors=True)
    for unit in (u for u in planned(layout) if u.stage == TRAIN and layout.of(u).done(u)):
        for task in layout.of(unit).tasks:
            shutil.rmtree(checkpoint_root(layout.of(unit).path(unit) / task), ignore_errors=True)
