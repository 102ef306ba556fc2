"""The units of work of a study: what each is, in coordinates that fit into a line of JSON, and where its result lies."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from plait.disk.store import identity, is_done, sha256_json
from plait.errors import Damaged, PlaitError, Unfinished
from plait.evaluation.evaluate import scored_labels
from plait.runs.inputs import Inputs, Labels, within
from plait.runs.jobs import NOT_IDENTITY
from plait.runs.session import Session, task_of
from plait.runs.study_spec import Study, StudyArm
from plait.tasks import Task
from plait.training.settings import TrainingSettings

STATISTICS, TRAIN, ALONE, MERGE, FEATURES = "statistics", "train", "alone", "merge", "features"
REPAIR, REPAIRED = "repair", "repaired"
DIVERGED = "diverged"  # in a result: why a training of the sweep, or a score of it, has nothing else
TUNING, FOLDS = "tuning", "folds"
Mend = Callable[[Path, PlaitError], None]
T = TypeVar("T")
_KEPT = 8  # sets of adapters or statistics


@dataclass(frozen=True, slots=True)
class Unit:
    """One result, by what it is about; JSON holds it, and with the study it says everything.

    Args:
        stage: statistics, train, alone, merge, features, repair (a merge trained further) or repaired (its scores).
        seed: Of data order, heads, samples, subsets.
        arm: Name of an arm.
        rate: Learning rate.
        step: Which moment of the training; 0 for its end.
        merge: Name of a merge.
        split: Which rows are scored: "tuning" or "folds".
        variant: Name of an ablation; "" for the study itself.
        pool, samples: Of statistics.
        scale: Of the merge that a repair starts from.
    """

    stage: str
    seed: int
    arm: str = ""
    rate: float = 0.0
    step: int = 0
    merge: str = ""
    split: str = ""
    variant: str = ""
    pool: str = ""
    samples: int = 0
    scale: float = 0.0

    @property
    def label(self) -> str:
        """What a person reads."""
        rate = f"lr {self.rate:g}" if self.rate else ""
        parts = [self.variant, self.stage, self.arm, rate, self.merge, f"seed {self.seed}"]
        return " ".join(p for p in parts if p)

    def to_json(self) -> dict[str, Any]:
        """Coordinates that are set."""
        return {k: v for k, v in asdict(self).items() if v or k == "seed"}


@dataclass
class Layout:
    """A study and a folder: identities of units and where their results lie.

    Args:
        study: The study.
        out: Its folder; results are addressed by content, so studies may share one.
        shared: The session whose loaded base a variant uses.
        recorded: What the folder says the study was made from; with it neither the base nor the data are looked for.
        known: What does not change any more once it is known: keys, what is done, results, choices.
        mend: Called with the folder of a damaged result and its fault, to clear it away; None makes it an error.
    """

    study: Study
    out: Path
    shared: Session | None = None
    recorded: Inputs | None = None
    _variants: dict[str, Layout] = field(default_factory=dict)
    _read: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    _wanted: dict[tuple[Unit, str], dict[str, Any]] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    mend: Mend | None = None

    @functools.cached_property
    def session(self) -> Session:
        """Tasks, rows and the base of the study."""
        return Session(self.study, self.shared)

    @functools.cached_property
    def background(self) -> Session:
        """The same of the tasks that only lend their statistics."""
        return Session(self.study.model_copy(update={"tasks": self.study.background}))

    def of(self, unit: Unit) -> Layout:
        """The layout of a unit's variant, which shares the base and rows loaded here where they are the same."""
        if not unit.variant:
            return self
        if unit.variant not in self._variants:
            study = self.study.variant(unit.variant)
            recorded = self.recorded.only(study) if self.recorded and within(study, self.study) else None
            self._variants[unit.variant] = Layout(study, self.out, self.session, recorded, mend=self.mend)
        return self._variants[unit.variant]

    def cached(self, key: Any, read: Callable[[], T]) -> T:
        """What `read` gives, kept while it is among the last few asked for; merges are made a little ahead of scores."""
        found = self._read.pop(key) if key in self._read else read()
        self._read[key] = found
        while len(self._read) > _KEPT:
            self._read.popitem(last=False)
        return found  # type: ignore[no-any-return]

    @functools.cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the base's weights."""
        return self.recorded.base_sha256 if self.recorded else self.session.base_sha256

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name, class names known."""
        return self.recorded.tasks if self.recorded else self.session.tasks

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """Task -> what its rows are."""
        return self.recorded.data if self.recorded else {t: self.session.data_identity(t) for t in self.tasks}

    def labels(self, task: str) -> Labels:
        """(n,) what a task's validation rows are scored against."""
        return (
            self.recorded.labels[task]
            if self.recorded
            else scored_labels(self.tasks[task], self.session.validation(task))
        )

    def settings(self, unit: Unit) -> TrainingSettings:
        """Training settings of a train unit: the arm's, at its rate, keeping every moment that somebody asks for."""
        arm = self.study.arm(unit.arm)
        settings = replace(self.study.training_of(arm), lr=unit.rate)
        last = settings.total_steps(1 << 40) if settings.steps else None
        moments = {a.snapshot for a in self.study.study_arms if a.like == arm.name and a.snapshot} | set(
            self.moments(arm)
        )
        kept = tuple(sorted(m for m in moments if m and (last is None or m < last)))
        tied = "joint" if arm.joint else None
        return replace(settings, snapshots=kept, tied=tied)

    def moments(self, arm: StudyArm) -> list[int]:
        """Moments the sweep of an arm may choose; 0 is the end."""
        return [0] if arm.joint else [*self.study.moments, 0]

    def statistics_unit(self, unit: Unit) -> Unit:
        """The statistics a train unit starts from, or a merge by moments reads."""
        arm = self.study.arm(unit.arm) if unit.arm else None
        spec = self.study.statistics
        pool = (arm.pool if arm and unit.stage == TRAIN else None) or spec.pool
        samples = (arm.samples if arm and unit.stage == TRAIN else None) or spec.samples
        return Unit(STATISTICS, unit.seed, variant=unit.variant, pool=pool, samples=samples)

    def trained_by(self, unit: Unit) -> Unit:
        """The train unit whose adapters a unit is about: of an arm that is a moment of another, that other's."""
        arm = self.study.arm(unit.arm)
        owner = arm.like if arm.snapshot and arm.like else arm.name
        return Unit(TRAIN, unit.seed, owner, unit.rate, variant=unit.variant)

    def wanted(self, unit: Unit, task: str = "") -> dict[str, Any]:
        """The identity of a unit's result; of a train unit's, for one task."""
        if (unit, task) not in self._wanted:
            makers = {STATISTICS: self._statistics, TRAIN: self._train, REPAIR: self._repair}
            options, inputs = makers.get(unit.stage, self._scored)(unit)
            if task:
                options = {**options, "task": task}
            self._wanted[unit, task] = identity(f"study-{unit.stage}", options, inputs, unit.seed)
        return self._wanted[unit, task]

    def path(self, unit: Unit) -> Path:
        """The folder of a unit's result."""
        return self.out / unit.stage / self.key(unit)[:24]

    def done(self, unit: Unit) -> bool:
        """Whether a unit's result is there, every byte as it was written; it is read for that, once in a process."""
        if ("done", unit) not in self.known:
            path = self.path(unit)
            if unit.stage in (TRAIN, REPAIR):
                each = [self._whole(path / t, self.wanted(unit, t)) for t in self.tasks]  # whatever the first one says
                found = all(each)
            else:
                found = self._whole(path, self.wanted(unit))
            if not found:
                return False
            self.known["done", unit] = True
        return True

    def _whole(self, path: Path, wanted: dict[str, Any]) -> bool:
        try:
            return is_done(path, wanted, read=True)
        except (Damaged, Unfinished) as e:
            if self.mend is None:
                raise
            self.mend(path, e)
            return False

    def _statistics(self, unit: Unit) -> tuple[dict[str, Any], dict[str, str]]:
        study = self.study
        options = {
            "base": self.base_sha256,
            "dtype": study.base.dtype,
            "data": self.data,
            "background": [self._background_identity(t) for t in study.background],
            "targets": study.lora.target_modules,
            **study.lora.limits,
            "max_length": study.data.max_length,
            "pool": unit.pool,
            "samples": unit.samples,
            "sketch": study.statistics.sketch,
        }
        return options, {}

    def _background_identity(self, spec: Any) -> dict[str, Any]:
        name = task_of(spec, self.background.root).name
        return self.recorded.background[name] if self.recorded else self.background.data_identity(name)

    def _train(self, unit: Unit) -> tuple[dict[str, Any], dict[str, str]]:
        from plait.subspaces import find_subspace_method

        study, arm = self.study, self.study.arm(unit.arm)
        settings = self.settings(unit)
        training = {k: v for k, v in asdict(settings).items() if k not in NOT_IDENTITY}
        start = {k: getattr(arm, k) for k in ("method", "row_norm", "options", "known", "background")}
        lora = study.lora.model_dump(exclude_none=True) | ({"rank": arm.rank} if arm.rank else {})
        options = {"start": start, "lora": lora, "training": training, "data": self.data}
        options |= {"rows": study.data.train_rows, "dtype": study.base.dtype, "base": self.base_sha256}
        measured = bool(find_subspace_method(arm.method).needs) or settings.constraint not in ("free", "frozen")
        source = self.statistics_unit(unit)
        return options, {"statistics": self.key(source)} if measured else {}

    def _scored(self, unit: Unit) -> tuple[dict[str, Any], dict[str, str]]:
        from plait.merging.registry import find_method

        study = self.study
        source = replace(unit, stage=REPAIR, split="") if unit.stage == REPAIRED else self.trained_by(unit)
        inputs = {"adapters": self.key(source)}
        options: dict[str, Any] = {"step": unit.step, "split": unit.split, **self.rows}
        if unit.stage == MERGE:
            spec = next(m for m in study.merge_specs if m.name == unit.merge)
            options |= {"merge": spec.model_dump(exclude={"name", "scales"}), "method": spec.merge_method}
            options |= {"scales": study.scales_of(spec)}
            if find_method(spec.merge_method).needs:
                inputs["statistics"] = self.key(self.statistics_unit(unit))
        elif unit.stage == FEATURES:
            inputs["statistics"] = self.key(self.statistics_unit(unit))
        return options, inputs

    def _repair(self, unit: Unit) -> tuple[dict[str, Any], dict[str, str]]:
        merge = replace(unit, stage=MERGE, split=FOLDS, scale=0.0)
        _, inputs = self._scored(merge)
        spec = next(m for m in self.study.merge_specs if m.name == unit.merge)
        steps = self.study.repair.steps if self.study.repair else 0
        return {
            "merge": spec.model_dump(exclude={"scales"}),
            "scale": unit.scale,
            "steps": steps,
            "rate": unit.rate,
        }, inputs

    @property
    def rows(self) -> dict[str, Any]:
        """What decides which validation rows are in which part."""
        study = self.study
        split = {"split_seed": study.evaluation.split_seed, "validation_rows": study.data.validation_rows}
        return {**split, "tuning_rows": study.tuning_rows, "grid_rows": study.grid_rows}

    def key(self, unit: Unit) -> str:
        """Hash of a unit's identity."""
        if ("key", unit) not in self.known:
            self.known["key", unit] = sha256_json(self.wanted(unit))
        return self.known["key", unit]  # type: ignore[no-any-return]


def pending(layout: Layout, units: Sequence[Unit]) -> list[Unit]:
    """Units whose result is not there, each once."""
    seen: dict[Path, Unit] = {}
    for unit in units:
        seen.setdefault(layout.of(unit).path(unit), unit)
    return [u for u in seen.values() if not layout.of(u).done(u)]
