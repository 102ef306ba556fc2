"""A study from its file to its tables: wave after wave through an executor, going on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.disk.locks import locked
from plait.disk.store import staged_file
from plait.progress import Progress, duration
from plait.runs.executors import Executor, batch_of, mender
from plait.runs.inputs import inputs_of, keep_inputs
from plait.runs.journal import noted
from plait.runs.study_spec import Study
from plait.runs.units import MERGE, REPAIR, TRAIN, Layout, Unit
from plait.runs.waves import next_wave

STUDY_FILE = "study.json"
_A_SCORER = 4  # batches of scores for each process that scores: they take unlike times


def run_study(
    study: Study,
    out: Path,
    executor: Executor,
    *,
    layout: Layout | None = None,
    seconds: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do what a study still lacks.

    Args:
        study: The study.
        out: Its folder.
        executor: Where units run.
        layout: Of the study, where the executor has one.
        seconds: Time after which no unit is begun; the study goes on at the next call.
        quiet: No progress on stderr.

    Returns:
        `finished`, the `wave` that is at work, the units `left` in it, `seconds`.
    """
    layout = layout or Layout(study, out)
    layout.mend = mender(Progress(0, 0).close)  # damage is told with --quiet too
    started = time.time()
    until = None if seconds is None else started + seconds
    device = layout.session.base.torch_device.type
    with locked(out), noted(out, device, type(executor).__name__, executor.workers, executor.scorers):
        _keep(layout)
        while until is None or time.time() < until:
            name, todo = next_wave(layout)
            if not todo:
                break
            progress = Progress(len(todo), len(todo), quiet)
            batches = [batch_of(study, out, part, until) for part in parts(todo, _batches(todo, executor))]
            executor.run(batches, told(progress))
            progress.close(f"{name}: {len(todo)} units, {duration(time.time() - started)} since the start")
    name, todo = next_wave(layout)
    return {"finished": not todo, "wave": name, "left": len(todo), "seconds": round(time.time() - started, 1)}


def told(progress: Progress) -> Callable[[str], None]:
    """A function that shows a line about each unit that begins."""

    def tell(text: str) -> None:
        progress.finish()
        progress.start(text, 1.0)

    return tell


def write_jobs(study: Study, out: Path, to: Path, workers: int) -> dict[str, Any]:
    """Write the open units of the next wave as job files for `plait job run`, one per worker.

    Returns:
        `wave` and the paths of the `jobs`; none where the study is finished. The next wave's exist once these are done.
    """
    layout = Layout(study, out, mend=mender(Progress(0, 0).close))
    _keep(layout)
    name, todo = next_wave(layout)
    made = []
    for i, part in enumerate(parts(todo, workers) if todo else []):
        path = to / f"job-{i:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path, overwrite=True) as stage:
            stage.write_text(json.dumps(batch_of(study, out, part)), encoding="utf-8")
        made.append(str(path))
    return {"wave": name, "jobs": made}


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
    return executor.workers if units[0].stage in (TRAIN, REPAIR) else _A_SCORER * executor.scorers


def _weight(units: Sequence[Unit]) -> int:
    return sum(4 if u.stage == MERGE else 1 for u in units)


def _keep(layout: Layout) -> None:
    """The study, and what it reads, as the folder keeps them: tables need nothing else."""
    text = layout.study.model_dump_json(indent=1) + "\n"
    target = layout.out / STUDY_FILE
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        with staged_file(target, overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
    keep_inputs(inputs_of(layout.session, layout.background), layout.out)
