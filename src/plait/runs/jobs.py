"""A recipe as a list of jobs: what each makes, from what, and where; nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plait.disk.store import identity, sha256_json
from plait.errors import UsageError
from plait.runs.recipe import ArmSpec, MergeSpec, Recipe, SnapshotArm
from plait.runs.session import Session

STATISTICS, INITIAL, ADAPTER, ALONE, MERGED, SCORES, BEST, REPORT = (
    "statistics", "initial", "adapter", "alone", "merged", "scores", "best", "report",
)  # fmt: skip
NOT_IDENTITY = {"report_to", "checkpoint_every", "shard_base"}  # they leave the adapter as it is
_BACKWARD = 2.5  # a training row costs about this many forward passes more


@dataclass(frozen=True, slots=True)
class Job:
    """One result on disk.

    Args:
        stage: Which stage makes it.
        path: The folder (statistics: the file) it becomes.
        wanted: Its identity: options, seed and the identities of what it is made from.
        arm, merge, task, seed: What it is about, where that applies.
        cost: Forward passes of one row it takes, roughly; for the estimate of time left.
    """

    stage: str
    path: Path
    wanted: dict[str, Any]
    seed: int
    arm: ArmSpec | None = None
    merge: MergeSpec | None = None
    task: str | None = None
    cost: float = 0.0

    @property
    def key(self) -> str:
        """The hash of its identity."""
        return sha256_json(self.wanted)

    @property
    def label(self) -> str:
        """What a person reads while it runs."""
        parts = [self.stage, self.arm.name if self.arm else None, self.merge.name if self.merge else None, self.task]
        return " ".join(p for p in parts if p) + (f" (seed {self.seed})" if self.seed else "")


@dataclass(slots=True)
class Plan:
    """All jobs of a recipe, in the order they are run, and ways to find them."""

    recipe: Recipe
    out: Path
    jobs: list[Job]

    def of(self, stage: str, *, arm: str | None = None, seed: int | None = None) -> list[Job]:
        """Jobs of a stage, of an arm and a seed where given."""
        return [
            j
            for j in self.jobs
            if j.stage == stage and (arm is None or (j.arm and j.arm.name == arm)) and (seed is None or j.seed == seed)
        ]

    def adapters(self, arm: ArmSpec | None, seed: int) -> dict[str, Path]:
        """Task -> folder of its trained adapter: of an arm, or of an arm's snapshot."""
        if isinstance(arm, SnapshotArm):
            return {j.task or "": j.path / "steps" / f"{arm.step:06d}" for j in self.of(ADAPTER, arm=arm.of, seed=seed)}
        return {j.task or "": j.path for j in self.of(ADAPTER, arm=arm.name if arm else None, seed=seed)}


def plan(session: Session, out: Path) -> Plan:
    """Every job of a recipe.

    Cost: hashes local data files and the base's weights once; reads no model.
    """
    plan = Plan(session.recipe, out, [])
    data = {t: session.data_identity(t) for t in session.tasks}
    for seed in session.recipe.seeds:
        plan.jobs += _statistics(session, out, seed, data)
        statistics = {j.task: j.key for j in plan.of(STATISTICS, seed=seed)}
        for arm in session.recipe.arm_specs:
            if isinstance(arm, SnapshotArm):
                plan.jobs += _arm_scores(session, out, seed, arm, statistics, _kept(plan, session, seed, arm))
            else:
                plan.jobs += _arm(session, out, seed, arm, statistics, data)
    plan.jobs.append(_summary(plan, BEST, {}))
    options = {"resamples": session.recipe.evaluation.resamples, "name": session.recipe.name}
    plan.jobs.append(_summary(plan, REPORT, options))
    return plan


def _statistics(session: Session, out: Path, seed: int, data: dict[str, Any]) -> Iterator[Job]:
    recipe = session.recipe
    for task in session.tasks:
        options = {
            "base": session.base_sha256,
            "dtype": recipe.base.dtype,
            "data": data[task],
            "targets": recipe.lora.target_modules,
            **recipe.lora.limits,
            "max_length": recipe.data.max_length,
            **recipe.statistics.model_dump(
                exclude={"batch_size"} | ({"memory"} if not recipe.statistics.memory else set())
            ),
        }
        path = out / "statistics" / f"seed-{seed}" / f"{task}.stats.safetensors"
        wanted = identity(STATISTICS, options, seed=seed)
        yield Job(STATISTICS, path, wanted, seed, task=task, cost=1.2 * recipe.statistics.samples)


def _arm(
    session: Session, out: Path, seed: int, arm: ArmSpec, statistics: dict[Any, str], data: dict[str, Any]
) -> Iterator[Job]:
    from plait.subspaces import find_subspace_method

    recipe = session.recipe
    where = f"{arm.name}/seed-{seed}"
    start = (
        arm.model_dump(exclude={"training", "name"})
        | {"subspace": arm.method}
        | recipe.lora.model_dump(exclude_none=True)
    )
    settings = recipe.training_of(arm)
    training = {k: v for k, v in asdict(settings).items() if k not in NOT_IDENTITY}
    measured = _prefixed("statistics", statistics)
    drawn_from_data = bool(find_subspace_method(arm.method).needs)
    start |= {} if drawn_from_data else {"base": session.base_sha256}
    kept_by_data = settings.constraint not in ("free", "frozen")
    adapters: dict[str, str] = {}
    for task in session.tasks:
        wanted = identity(INITIAL, {**start, "task": task}, measured if drawn_from_data else {}, seed)
        initial = Job(INITIAL, out / "initial" / where / task, wanted, seed, arm, task=task)
        yield initial
        options = {"training": training, "data": data[task], "rows": recipe.data.train_rows, "dtype": recipe.base.dtype}
        options |= {"selection": recipe.data.selection_rows} if settings.evaluate_every else {}
        rows = settings.total_steps(len(session.training(task, seed))) * settings.batch_size
        wanted = identity(ADAPTER, options, {"initial": initial.key, **(measured if kept_by_data else {})}, seed)
        job = Job(ADAPTER, out / "adapters" / where / task, wanted, seed, arm, task=task, cost=rows * (1 + _BACKWARD))
        adapters[task] = job.key
        yield job
    yield from _arm_scores(session, out, seed, arm, statistics, adapters)


def _kept(plan: Plan, session: Session, seed: int, arm: SnapshotArm) -> dict[str, str]:
    """Identities of the adapters of a snapshot, which its arm's training leaves."""
    settings = plan.recipe.training_of(arm)
    for task in session.tasks:
        total = settings.total_steps(len(session.training(task, seed)))
        if arm.step > total:
            raise UsageError(f"snapshot after step {arm.step}, and the training has {total}", where=f"task {task}")
    return {j.task or "": f"{j.key}@{arm.step}" for j in plan.of(ADAPTER, arm=arm.of, seed=seed)}


def _arm_scores(
    session: Session, out: Path, seed: int, arm: ArmSpec, statistics: dict[Any, str], adapters: dict[str, str]
) -> Iterator[Job]:
    from plait.merging.registry import find_method

    recipe = session.recipe
    where = f"{arm.name}/seed-{seed}"
    rows = sum(len(session.validation(t)) for t in session.tasks)
    protocol = {"split_seed": recipe.evaluation.split_seed, "validation_rows": recipe.data.validation_rows}
    inputs = _prefixed("adapter", adapters)
    wanted = identity(ALONE, protocol, inputs, seed)
    yield Job(ALONE, out / "scores" / where / "alone", wanted, seed, arm, cost=rows * 1.5)
    for merge in recipe.merge_specs:
        options = merge.model_dump(exclude={"scales", "name"}) | {"method": merge.merge_method}
        measured = _prefixed("statistics", statistics) if find_method(merge.merge_method).needs else {}
        wanted = identity(MERGED, options, inputs | measured, seed)
        merged = Job(MERGED, out / "merged" / where / merge.name, wanted, seed, arm, merge)
        yield merged
        scales = recipe.scales_of(merge)
        wanted = identity(SCORES, {**protocol, "scales": scales}, {"merged": merged.key}, seed)
        cost = rows * (len(scales) + 1) / 2
        yield Job(SCORES, out / "scores" / where / f"merged-{merge.name}", wanted, seed, arm, merge, cost=cost)


def _summary(plan: Plan, stage: str, options: dict[str, Any]) -> Job:
    made = {str(j.path.relative_to(plan.out)): j.key for j in plan.jobs if j.stage in (ALONE, SCORES)}
    return Job(stage, plan.out / stage, identity(stage, options, made), plan.recipe.seeds[0])


def _prefixed(prefix: str, values: dict[Any, str]) -> dict[str, str]:
    return {f"{prefix}/{k}": v for k, v in values.items()}
