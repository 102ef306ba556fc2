"""How each kind of job is done: read, compute, write; one short function a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.store import staged_folder
from plait.errors import RunError
from plait.evaluation.evaluate import Logits, halves
from plait.evaluation.scores import ALONE as ALONE_SCORE
from plait.evaluation.scores import FLOOR, MERGED, REPORTED, SELECTION, Score, mean_score, read_scores, write_scores
from plait.runs.collecting import collect_file
from plait.runs.jobs import ADAPTER, ALONE, BEST, INITIAL, REPORT, SCORES, STATISTICS, Job, Plan
from plait.runs.jobs import MERGED as MERGED_JOB
from plait.runs.session import Session
from plait.statistics import Statistics, open_statistics
from plait.subspaces.start import InitialSettings, initial_adapters
from plait.training.peft_model import TASK_TYPES

if TYPE_CHECKING:
    from plait.training import Member

SCORES_FILE, PREDICTIONS_FILE = "scores.jsonl", "predictions.safetensors"
Progress = Callable[[int, int, float | None], None]
Settled = dict[str, Any]  # what a job wants to be remembered in its manifest


def run_job(
    job: Job, plan: Plan, session: Session, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Do one job; its result is whole on disk when this returns."""
    if job.stage == ADAPTER:
        _train(job, plan, session, overwrite, progress)
    elif job.stage == STATISTICS:
        collect_file(session, job.task or "", job.path, seed=job.seed, wanted=job.wanted, overwrite=overwrite)
    else:
        makers = {INITIAL: _initial, ALONE: _alone, MERGED_JOB: _merge, SCORES: _score, BEST: _best, REPORT: _report}
        result: Settled = {}
        with staged_folder(job.path, job.wanted, overwrite=overwrite, result=result, unit=True) as folder:
            makers[job.stage](job, plan, session, folder, result)


# --- before training --------------------------------------------------------------------------------------------------


def _initial(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    alike = job.arm.model_dump_json(exclude={"name", "training"}) + job.arm.method if job.arm else ""
    made = session.remember("initial", (alike, job.seed), lambda: initial_of(job, plan, session))
    adapter, record = made[job.task or ""]
    result |= {"task": job.task, **record}
    write_adapter(folder, adapter)


def initial_of(job: Job, plan: Plan, session: Session) -> dict[str, tuple[Adapter, Settled]]:
    """All tasks' adapters of an arm and seed at once: they share one factorisation per site."""
    recipe, arm = plan.recipe, job.arm or plan.recipe.arm_specs[0]
    settings = InitialSettings(
        arm.method,
        recipe.lora.rank,
        recipe.lora.alpha,
        arm.row_norm,
        arm.options,
        task_type=TASK_TYPES[next(iter(session.tasks.values())).kind],
        target_modules=recipe.lora.recorded_targets,
    )
    return initial_adapters(
        _statistics(plan, job.seed),
        settings,
        base=recipe.base.model,
        revision=recipe.base.revision,
        seed=job.seed,
        device=session.base.torch_device,
    )


# --- training and merging ---------------------------------------------------------------------------------------------


def member_of(job: Job, plan: Plan, session: Session) -> Member:
    """Everything that one adapter's training takes."""
    from plait.training import Member

    task, arm = job.task or "", job.arm or plan.recipe.arm_specs[0]
    initial = next(j.path for j in plan.of(INITIAL, arm=arm.name, seed=job.seed) if j.task == task)
    settings = plan.recipe.training_of(arm)
    statistics = None
    if settings.constraint not in ("free", "frozen"):
        # one object for all of a seed: members that share it share their constraints' matrices
        statistics = session.remember("statistics", job.seed, lambda: _statistics(plan, job.seed))
    return Member(
        read_adapter(initial, name=task),
        session.tasks[task],
        session.training(task, job.seed),
        settings,
        job.seed,
        job.path,
        job.wanted,
        statistics,
        session.selection(task, job.seed) if settings.evaluate_every else None,
    )


def _statistics(plan: Plan, seed: int) -> dict[str, Statistics]:
    """By task, their sites still in the files: all of them at once may be more than fits."""
    return {j.task or "": open_statistics(j.path) for j in plan.of(STATISTICS, seed=seed)}


def _train(job: Job, plan: Plan, session: Session, overwrite: bool, progress: Progress | None) -> None:
    from plait.training import train_adapter

    m = member_of(job, plan, session)
    train_adapter(
        m.initial,
        m.task,
        m.examples,
        session.base,
        m.settings,
        seed=m.seed,
        out=m.out,
        identity=m.identity,
        overwrite=overwrite,
        progress=progress,
        statistics=m.statistics,
        selection=m.selection,
    )


def train_together(
    jobs: Sequence[Job], plan: Plan, session: Session, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Train many adapters in one process, the base's passes shared (see `plait.training.train_fleet`)."""
    from plait.training import train_fleet

    members = [member_of(j, plan, session) for j in jobs]
    train_fleet(members, session.base, overwrite=overwrite, progress=progress)


def _trained(job: Job, plan: Plan, session: Session) -> dict[str, Adapter]:
    return {task: session.adapter(path, task) for task, path in plan.adapters(job.arm, job.seed).items()}


def _merge(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    from plait.merging import merge, merge_methods

    spec = job.merge
    if spec is None:
        raise RunError("a job without a merge", where=job.label)
    needs = merge_methods()[spec.merge_method].needs
    statistics = _statistics(plan, job.seed) if needs else None
    merged = merge(
        list(_trained(job, plan, session).values()),
        spec.merge_method,
        options=spec.options,
        scale=1.0,
        calibrate=spec.calibrate,
        rank=spec.rank,
        statistics=statistics,
        seed=job.seed,
        name=spec.name,
    )
    result |= merged.record
    write_adapter(folder, merged.adapter)


# --- scores -----------------------------------------------------------------------------------------------------------


def _alone(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    rows: list[Score] = []
    kept: dict[str, Logits] = {}
    for task, adapter in _trained(job, plan, session).items():
        for kind, worn in ((ALONE_SCORE, adapter), (FLOOR, None)):
            found = session.evaluator.predict(task, adapter.heads.get(task, {}), worn)
            kept[f"{kind}.{task}"] = found
            for split, part in _halves(task, session).items():
                labels = _labels(job, kind, 0.0 if worn is None else 1.0, split)
                rows += session.evaluator.score_rows(found[part], task, part, **labels)
    _write_scores(folder, rows, kept)
    result |= {
        kind: mean_score(r for r in rows if r.adapter == kind and r.split == REPORTED) for kind in (ALONE_SCORE, FLOOR)
    }


def _score(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    adapters = _trained(job, plan, session)
    heads = {t: a.heads.get(t, {}) for t, a in adapters.items()}
    merged = session.adapter(
        next(
            j.path
            for j in plan.of(MERGED_JOB, arm=job.arm.name if job.arm else None, seed=job.seed)
            if j.merge == job.merge
        )
    )
    scales = plan.recipe.scales_of(job.merge) if job.merge else [1.0]
    rows: list[Score] = []
    for task, head in heads.items():
        part = _halves(task, session)[SELECTION]
        for scale, found in zip(scales, _grid(session, task, head, merged, scales, part), strict=True):
            rows += session.evaluator.score_rows(found, task, part, **_labels(job, MERGED, scale, SELECTION))
    chosen = max(scales, key=lambda s: mean_score(r for r in rows if r.scale == s))
    kept: dict[str, Logits] = {}
    for task, head in heads.items():
        part = _halves(task, session)[REPORTED]
        kept[f"{MERGED}.{task}"] = session.evaluator.predict(task, head, merged, chosen, part)
        labels = _labels(job, MERGED, chosen, REPORTED)
        rows += session.evaluator.score_rows(kept[f"{MERGED}.{task}"], task, part, **labels)
    _write_scores(folder, rows, kept)
    reported = mean_score(r for r in rows if r.split == REPORTED)
    edge = len(scales) > 1 and chosen in (scales[0], scales[-1])
    result |= {"scale": chosen, "selection": mean_score(r for r in rows if r.scale == chosen and r.split == SELECTION)}
    result |= {"reported": reported, "scale_on_edge_of_grid": edge}


def _grid(session: Session, task: str, head: Any, merged: Adapter, scales: Sequence[float], part: Any) -> list[Logits]:
    evaluator = session.evaluator
    if session.base.torch_device.type == "cpu":  # nothing is won by stacking there, and this is the plainer path
        return [evaluator.predict(task, head, merged, scale, part) for scale in scales]
    from plait.evaluation.fleet import Candidate, predict_many

    return predict_many(evaluator, task, [Candidate(head, merged, scale) for scale in scales], part)


def _halves(task: str, session: Session) -> dict[str, Any]:
    return halves(len(session.validation(task)), session.recipe.evaluation.split_seed)


def _labels(job: Job, adapter: str, scale: float, split: str) -> dict[str, Any]:
    method = job.merge.name if job.merge else ""
    arm = job.arm.name if job.arm else ""
    return {"arm": arm, "adapter": adapter, "method": method, "scale": scale, "seed": job.seed, "split": split}


def _write_scores(folder: Path, rows: list[Score], predictions: dict[str, Logits]) -> None:
    from plait.adapters.tensor_file import write_tensors

    write_scores(folder / SCORES_FILE, rows)
    write_tensors(
        folder / PREDICTIONS_FILE, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in predictions.items()}
    )


# --- after everything -------------------------------------------------------------------------------------------------


def _best(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    from plait.adapters.lora import LoraFactors
    from plait.disk.store import read_manifest

    scored = [(read_manifest(j.path) or {}, j) for j in plan.of(SCORES)]
    manifest, best = max(scored, key=lambda pair: pair[0]["result"]["selection"])
    source = next(j for j in plan.of(MERGED_JOB, seed=best.seed) if j.arm == best.arm and j.merge == best.merge)
    merged, scale = read_adapter(source.path, name=plan.recipe.name), manifest["result"]["scale"]
    modules = {m: LoraFactors(f.A, f.B * (f.scaling * scale), 1.0, f.kind) for m, f in merged.modules.items()}
    write_adapter(folder, replace(merged, modules=modules))
    kept = (read_manifest(source.path) or {})["result"]
    result |= {k: kept[k] for k in ("method", "options", "weights", "tasks", "backbone_prefix") if k in kept}
    result |= {"arm": best.arm.name if best.arm else "", "seed": best.seed, "scale": scale, **manifest["result"]}


def _report(job: Job, plan: Plan, session: Session, folder: Path, result: Settled) -> None:
    from plait.report import write_report

    result |= {"headline": write_report(folder, plan, session)}


def all_scores(plan: Plan) -> list[Score]:
    """Every row of every scores folder of a plan that is finished."""
    return [row for j in plan.jobs if j.stage in (ALONE, SCORES) for row in read_scores(j.path / SCORES_FILE)]
