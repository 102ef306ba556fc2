"""The straight line: walk the jobs of a recipe in order, skip what is already there, resume where it stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plait.disk.locks import locked
from plait.disk.overwriting import require_replaceable, require_replaceable_file
from plait.disk.store import discard, is_done, read_json, require_regular, sha256_json, staged_file
from plait.errors import Damaged, InputError, PlaitError, Unfinished, UsageError
from plait.model.base import emulated
from plait.progress import Progress, duration
from plait.runs.jobs import ADAPTER, BEST, INITIAL, REPORT, STATISTICS, Job, Plan, plan
from plait.runs.recipe import Recipe
from plait.runs.session import Session
from plait.tasks.task import TEXT_KINDS

RECIPE_FILE = "recipe.json"


def run(recipe: Recipe, out: Path, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Do everything a recipe says.

    Args:
        recipe: The checked recipe.
        out: The folder of the run; one that holds a part of this run is gone on with.
        overwrite: Redo jobs whose folder holds the result of other settings (results that match are always kept). A result
            that is damaged is done again in any case, with a line on stderr that says so.
        quiet: No progress on stderr.

    Returns:
        The report's headline (see `plait.report`), with `seconds`, `jobs` done and `reused`.

    Raises:
        UsageError: `out` holds results of other settings; nothing was changed.
        EnvironmentFault: Another process is at work on `out`.
    """
    from plait.statistics.files import is_statistics

    started = time.monotonic()
    session = Session(recipe)
    require_scorable(session)
    whole = plan(session, out)
    damaged: list[tuple[Job, PlaitError]] = []
    begun = (out / RECIPE_FILE).is_file()
    for job in whole.jobs if overwrite and not begun else ():  # nothing in it is known to be ours
        if job.stage == STATISTICS:
            require_replaceable_file(job.path, is_statistics)
        else:
            require_replaceable(job.path)
    todo = pending(whole.jobs, overwrite=overwrite, damaged=damaged if begun else None)
    progress = Progress(sum(j.cost for j in todo), len(todo), quiet)
    if todo and (slow := emulated(session.base)):
        progress.close(slow)
    for job, fault in damaged:
        Progress(0, 0).close(f"{job.label} is done again: {fault}")  # with --quiet too
    if todo or not _is_kept(recipe, out):
        with locked(out):
            again: list[tuple[Job, PlaitError]] = []
            todo = pending(todo, overwrite=overwrite, damaged=again)  # others may have finished some meanwhile
            for job, _ in again:
                discard(job.path)
            write_recipe(recipe, out)
            for batch in batches_of(todo, together=trains_together(recipe, session)):
                _do(batch, whole, session, progress, overwrite)
            _clear_checkpoints(whole)
    seconds = time.monotonic() - started
    progress.close(f"{len(todo)} jobs done, {len(whole.jobs) - len(todo)} reused, {duration(seconds)}")
    counted = {"seconds": round(seconds, 2), "jobs": len(todo), "reused": len(whole.jobs) - len(todo)}
    return {**_outcome(whole), **counted}


def require_scorable(session: Session) -> None:
    """Refuse, before anything is computed, kinds of tasks that no one model can do together.

    Raises:
        UsageError: Names the task.
    """
    tasks = list(session.tasks.values())
    forms = {t.name: t.kind if t.kind in TEXT_KINDS else "with a head" for t in tasks}
    for task in tasks:
        if forms[task.name] != forms[tasks[0].name]:
            raise UsageError(
                f"a run has tasks of one form, this is {forms[task.name]} and {tasks[0].name} is {forms[tasks[0].name]}",
                where=f"task {task.name}",
            )


def trains_together(recipe: Recipe, session: Session) -> bool:
    """Whether adapters are trained as a fleet: asked for, or on a GPU, where solo steps leave it idle."""
    return recipe.fleet == "always" or (recipe.fleet == "auto" and session.base.torch_device.type == "cuda")


def batches_of(jobs: Sequence[Job], *, together: bool) -> list[list[Job]]:
    """Jobs one by one in their order; `together` puts all trainings into one batch, after what they start from."""
    adapters = [j for j in jobs if j.stage == ADAPTER]
    if not together or len(adapters) < 2:
        return [[j] for j in jobs]
    before = [[j] for j in jobs if j.stage in (STATISTICS, INITIAL)]
    after = [[j] for j in jobs if j.stage not in (STATISTICS, INITIAL, ADAPTER)]
    return [*before, adapters, *after]


def _do(batch: Sequence[Job], whole: Plan, session: Session, progress: Progress, overwrite: bool) -> None:
    from plait.runs.stages import run_job, train_together

    def within(step: int, steps: int, loss: float | None) -> None:
        progress.within(step / max(1, steps))

    label = batch[0].label if len(batch) == 1 else f"{len(batch)} adapters together"
    progress.start(label, sum(j.cost for j in batch), len(batch))
    if len(batch) == 1:
        run_job(batch[0], whole, session, overwrite=overwrite, progress=within)
    else:
        train_together(batch, whole, session, overwrite=overwrite, progress=within)
    progress.finish()


def _clear_checkpoints(whole: Plan) -> None:
    """Remove what a run killed between an adapter's rename and the removal of its checkpoints has left."""
    from plait.training.checkpoints import checkpoint_root

    for job in whole.of(ADAPTER):
        shutil.rmtree(checkpoint_root(job.path), ignore_errors=True)


def pending(
    jobs: Iterable[Job], *, overwrite: bool = False, damaged: list[tuple[Job, PlaitError]] | None = None
) -> list[Job]:
    """The jobs whose result is not there, whole.

    Args:
        jobs: Which.
        overwrite: Whether results of other settings are to be replaced.
        damaged: Gets those of which a result is there and damaged, with what is wrong; None raises that.

    Raises:
        UsageError: A result of other settings stands in the place of one (unless `overwrite`).
        Damaged: See `damaged`.
    """
    found = []
    for job in jobs:
        try:
            if not finished(job, overwrite=overwrite and damaged is None):
                found.append(job)
        except (Damaged, Unfinished) as e:
            if damaged is None:
                raise
            damaged.append((job, e))
            found.append(job)
        except (UsageError, InputError):
            if not overwrite:
                raise
            found.append(job)
    return found


def finished(job: Job, *, overwrite: bool = False) -> bool:
    """Whether a job's result is on disk, every byte as it was written, and made with the same settings.

    Cost: reads the result.
    """
    try:
        if job.stage != STATISTICS:
            return is_done(job.path, job.wanted, read=True)
        return _statistics_done(job)
    except (UsageError, InputError):  # other settings, or a manifest that is damaged or of another version
        if overwrite:
            return False
        raise


def _statistics_done(job: Job) -> bool:
    from plait.statistics import open_statistics, read_identity

    if not job.path.exists():
        return False
    require_regular(job.path)
    try:
        found = read_identity(job.path)
        for moments in open_statistics(job.path).sites.values():
            del moments  # each is held against its hash as it is read
    except InputError as e:
        raise Damaged(e.what, where=e.where, hint=e.hint) from None
    if found is None or sha256_json(found) != sha256_json(job.wanted):
        raise UsageError("exists with other settings", where=str(job.path), hint="choose another --out, or --overwrite")
    return True


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Keep the resolved recipe beside its results."""
    if not _is_kept(recipe, out):
        with staged_file(out / RECIPE_FILE, overwrite=True) as stage:
            stage.write_text(_text(recipe), encoding="utf-8")


def _is_kept(recipe: Recipe, out: Path) -> bool:
    target = out / RECIPE_FILE
    return target.is_file() and target.read_bytes() == _text(recipe).encode()


def _text(recipe: Recipe) -> str:
    return recipe.model_dump_json(indent=1) + "\n"


def report(folder: Path) -> dict[str, Any]:
    """Write the report of a finished run again from its scores, and return the headline.

    Raises:
        InputError: The folder is not a run, or a part of the run is missing.
    """
    from plait.runs.recipe_file import parse_recipe
    from plait.runs.stages import run_job

    recipe = parse_recipe(read_json(folder / RECIPE_FILE), str(folder / RECIPE_FILE))
    session = Session(recipe)
    whole = plan(session, folder)
    missing = pending([j for j in whole.jobs if j.stage != REPORT], overwrite=True)
    if missing:
        raise InputError(
            f"{len(missing)} jobs are not done, the first is {missing[0].label}", where=str(folder), hint="plait run"
        )
    run_job(whole.of(REPORT)[0], whole, session, overwrite=True)
    return _outcome(whole)


def _outcome(whole: Plan) -> dict[str, Any]:
    page = whole.of(REPORT)[0].path
    headline = read_json(page / "report.json")["headline"]
    places = {"report": str((page / "report.html").absolute()), "best": str(whole.of(BEST)[0].path.absolute())}
    return {**headline, **places}


def describe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """What `run` would do, without doing it: jobs by stage, what is there already, sizes.

    Cost: hashes the data and the base once.
    """
    session = Session(recipe)
    require_scorable(session)
    whole = plan(session, out)
    stages: dict[str, dict[str, int]] = {}
    for job in whole.jobs:
        row = stages.setdefault(job.stage, {"jobs": 0, "reused": 0})
        row["jobs"] += 1
        row["reused"] += finished(job, overwrite=True)
    adapters = len(whole.of(ADAPTER))
    rows = {t: {"validation": len(session.validation(t))} for t in session.tasks}
    todo = [j for j in whole.jobs if not finished(j, overwrite=True)]
    return {
        "out": str(out),
        "stages": stages,
        "adapters": adapters,
        "rows": rows,
        "forward_rows": round(sum(j.cost for j in todo)),
    }
