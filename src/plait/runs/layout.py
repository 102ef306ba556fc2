"""Where the results of a recipe's units lie, and what each is made from.

The identity of a unit's result is everything that it depends on. Results of a study, whose units differ in coordinates nobody would
type, are addressed by the hash of their identity, so that studies may share a folder. A plain recipe's lie under names:
``adapters/ARM/seed-0/TASK``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from plait.border.checked import Json
from plait.disk.store import identity, is_done, sha256_json
from plait.errors import Damaged, InputError, PlaitError, Unfinished, UsageError
from plait.evaluation.evaluate import scored_labels
from plait.recipes.recipe import Recipe
from plait.recipes.recipe_file import variant_of
from plait.recipes.sections import ArmSpec
from plait.runs.inputs import Inputs, Labels, is_read_alike, within
from plait.runs.lengths import Cuts, cuts_of
from plait.runs.names import named
from plait.runs.recent import Recent
from plait.runs.session import Session, task_of
from plait.runs.units import FEATURES, FOLDS, MERGE, REPAIR, REPAIRED, STATISTICS, TRAIN, Unit
from plait.runs.unlabelled import lending_alone
from plait.tasks import Task
from plait.training.settings import TrainingSettings, identity_of

Mend = Callable[[Path, PlaitError], None]
T = TypeVar("T")
NOT_IDENTITY = {"report_to", "checkpoint_every", "shard_base"}  # settings that leave the adapter as it is


@dataclass
class Layout:
    """A recipe and a folder: identities of units and where their results lie.

    Args:
        recipe: The recipe.
        out: Its folder.
        shared: The session whose loaded base a variant uses.
        recorded: What the folder says the recipe was run on; with it neither the base nor the data are looked for.
        known: What does not change any more once it is known: keys, what is done, results, choices.
        mend: Called with the folder of a damaged result and its fault, to clear it away; None makes it an error.
        overwrite: Whether results of other settings, which can only stand in the way under names, are made again.
    """

    recipe: Recipe
    out: Path
    shared: Session | None = None
    recorded: Inputs | None = None
    _variants: dict[str, Layout] = field(default_factory=dict)
    _read: Recent = field(default_factory=Recent)
    _wanted: dict[tuple[Unit, str], dict[str, Any]] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    mend: Mend | None = None
    overwrite: bool = False

    @functools.cached_property
    def session(self) -> Session:
        """Tasks, rows and the base of the recipe."""
        return Session(self.recipe, self.shared)

    @functools.cached_property
    def background(self) -> Session:
        """The same of the tasks that only lend their statistics, whose rows need no labels."""
        return Session(lending_alone(self.recipe))

    def of(self, unit: Unit) -> Layout:
        """The layout of a unit's variant, which shares the base and rows loaded here where they are the same."""
        if not unit.variant:
            return self
        if unit.variant not in self._variants:
            variant = variant_of(self.recipe, unit.variant)
            recorded = self.recorded.only(variant) if self.recorded and within(variant, self.recipe) else None
            shared = self.session if is_read_alike(variant, self.recipe) else None
            self._variants[unit.variant] = Layout(variant, self.out, shared, recorded)
        here = self._variants[unit.variant]
        here.mend, here.overwrite = self.mend, self.overwrite  # as they are now: both change while a run begins
        return here

    def cached(self, key: Any, read: Callable[[], T]) -> T:
        """What `read` gives, kept while it is among the last few asked for; merges are made a little ahead of scores."""
        return self._read.get(key, read)

    @functools.cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the base's weights."""
        return self.recorded.base_sha256 if self.recorded else self.session.base_sha256

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name, class names known."""
        return self.recorded.tasks if self.recorded else self.session.tasks

    @functools.cached_property
    def data(self) -> Json:
        """Task -> what its rows are."""
        return self.recorded.data if self.recorded else {t: self.session.data_identity(t) for t in self.tasks}

    @functools.cached_property
    def cuts(self) -> Cuts:
        """Task -> split -> how many rows are longer than `data.max_length`, of the first seed."""
        return self.recorded.cut if self.recorded else cuts_of(self.session, self.recipe.seeds[0])

    def labels(self, task: str) -> Labels:
        """(n,) what a task's validation rows are scored against."""
        return (
            self.recorded.labels[task]
            if self.recorded
            else scored_labels(self.tasks[task], self.session.validation(task))
        )

    def settings(self, unit: Unit) -> TrainingSettings:
        """Training settings of a train unit: the arm's, at its rate, keeping every moment that somebody asks for."""
        arm = self.recipe.arm(unit.arm)
        settings = replace(self.recipe.training_of(arm), lr=unit.rate)
        last = settings.total_steps(1 << 40) if settings.steps else None
        moments = {a.snapshot for a in self.recipe.arm_specs if a.like == arm.name and a.snapshot}
        moments |= set(self.moments(arm))
        kept = tuple(sorted(m for m in moments if m and (last is None or m < last or not self.recipe.tuned)))
        return replace(settings, snapshots=kept, tied="joint" if arm.joint else None)

    def moments(self, arm: ArmSpec) -> list[int]:
        """Moments the sweep of an arm may choose; 0 is the end."""
        return [0] if arm.joint else [*self.recipe.moments, 0]

    @property
    def trains_together(self) -> bool:
        """Whether adapters are trained as a fleet: asked for, swept, or on a GPU, where solo steps leave it idle."""
        fleet = self.recipe.fleet
        return fleet == "always" or (
            fleet == "auto" and (self.recipe.tuned or self.session.base.torch_device.type == "cuda")
        )

    def statistics_unit(self, unit: Unit) -> Unit:
        """The statistics a train unit starts from, or a merge by moments reads."""
        arm = self.recipe.arm(unit.arm) if unit.arm else None
        spec = self.recipe.statistics
        pool = (arm.pool if arm and unit.stage == TRAIN else None) or spec.pool
        samples = (arm.samples if arm and unit.stage == TRAIN else None) or spec.samples
        return Unit(STATISTICS, unit.seed, variant=unit.variant, pool=pool, samples=samples)

    def trained_by(self, unit: Unit) -> Unit:
        """The train unit whose adapters a unit is about: of an arm that is a moment of another, that other's."""
        arm = self.recipe.arm(unit.arm)
        owner = arm.like if arm.snapshot and arm.like else arm.name
        return Unit(TRAIN, unit.seed, owner, unit.rate, variant=unit.variant)

    def wanted(self, unit: Unit, task: str = "") -> Json:
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
        return self.out / (unit.stage + "/" + self.key(unit)[:24] if self.recipe.tuned else named(self.recipe, unit))

    def done(self, unit: Unit) -> bool:
        """Whether a unit's result is there, every byte as it was written; it is read for that, once in a process."""
        if ("done", unit) not in self.known:
            path = self.path(unit)
            if unit.stage in (TRAIN, REPAIR):
                each = [
                    self.is_whole(path / t, self.wanted(unit, t)) for t in self.tasks
                ]  # whatever the first one says
                found = all(each)
            else:
                found = self.is_whole(path, self.wanted(unit))
            if not found:
                return False
            self.known["done", unit] = True
        return True

    def is_whole(self, path: Path, wanted: Mapping[str, Any], *, overwrite: bool = False) -> bool:
        """Whether a folder holds a result, every byte as it was written; what is damaged is cleared away by `mend`.

        Args:
            path: The folder.
            wanted: The result's identity.
            overwrite: Take another result as none, also where the run as a whole overwrites nothing.

        Raises:
            UsageError: It holds another result, and nothing is overwritten.
            Damaged: It is damaged, and nobody mends it.
        """
        try:
            return is_done(path, wanted, read=True)
        except (Damaged, Unfinished) as e:
            if self.mend is None:
                raise
            self.mend(path, e)
            return False
        except (UsageError, InputError):  # other settings, or a manifest of another version
            if not (overwrite or self.overwrite):
                raise
            return False

    def _statistics(self, unit: Unit) -> tuple[Json, dict[str, str]]:
        recipe = self.recipe
        options = {
            "base": self.base_sha256,
            "dtype": recipe.base.dtype,
            "data": self.data,
            "background": [self._background_identity(t) for t in recipe.background],
            "targets": recipe.lora.target_modules,
            **recipe.lora.limits,
            "max_length": recipe.data.max_length,
            "pool": unit.pool,
            "samples": unit.samples,
            "sketch": recipe.statistics.sketch,
        }
        if recipe.statistics.memory is not None:
            options["memory"] = recipe.statistics.memory
        if recipe.statistics.output_gradients:
            options["output_gradients"] = True
        if recipe.statistics.follows_batches:
            options["batch_size"] = recipe.statistics.batch_size
        return options, {}

    def _background_identity(self, spec: Any) -> Json:
        name = task_of(spec, self.session.root).name
        return self.recorded.background[name] if self.recorded else self.background.data_identity(name)

    def _train(self, unit: Unit) -> tuple[Json, dict[str, str]]:
        from plait.subspaces import find_subspace_method

        recipe, arm = self.recipe, self.recipe.arm(unit.arm)
        settings = self.settings(unit)
        training = {k: v for k, v in identity_of(settings).items() if k not in NOT_IDENTITY}
        start = {k: getattr(arm, k) for k in ("method", "row_norm", "options", "known", "background")}
        lora = recipe.lora.model_dump(exclude_none=True) | ({"rank": arm.rank} if arm.rank else {})
        options: Json = {"start": start, "lora": lora, "training": training, "data": self.data}
        options |= {"rows": recipe.data.train_rows, "dtype": recipe.base.dtype, "base": self.base_sha256}
        if settings.constraint_options.get("curvature"):
            options["statistics_batch_size"] = recipe.statistics.batch_size  # heads and answers are drawn by batches
        if recipe.data.selection_rows is not None:  # they are kept back from all arms
            options["selection"] = recipe.data.selection_rows
        measured = bool(find_subspace_method(arm.method).needs) or settings.constraint not in ("free", "frozen")
        source = self.statistics_unit(unit)
        return options, {"statistics": self.key(source)} if measured else {}

    def _scored(self, unit: Unit) -> tuple[Json, dict[str, str]]:
        from plait.merging.registry import find_method

        recipe = self.recipe
        source = replace(unit, stage=REPAIR, split="") if unit.stage == REPAIRED else self.trained_by(unit)
        inputs = {"adapters": self.key(source)}
        options: dict[str, Any] = {"step": unit.step, "split": unit.split, **self.rows}
        if unit.stage == MERGE:
            spec = recipe.merge(unit.merge)
            options |= {"merge": spec.model_dump(exclude={"name", "scales"}), "method": spec.merge_method}
            options |= {"scales": recipe.scales_of(spec)}
            if not recipe.grows:
                options["grow"] = False
            if find_method(spec.merge_method).needs:
                inputs["statistics"] = self.key(self.statistics_unit(unit))
        elif unit.stage == FEATURES:
            inputs["statistics"] = self.key(self.statistics_unit(unit))
        return options, inputs

    def _repair(self, unit: Unit) -> tuple[Json, dict[str, str]]:
        merge = replace(unit, stage=MERGE, split=FOLDS, scale=0.0)
        _, inputs = self._scored(merge)
        spec = self.recipe.merge(unit.merge)
        steps = self.recipe.repair.steps if self.recipe.repair else 0
        return {
            "merge": spec.model_dump(exclude={"scales"}),
            "scale": unit.scale,
            "steps": steps,
            "rate": unit.rate,
        }, inputs

    @property
    def rows(self) -> Json:
        """What decides which validation rows are in which part."""
        recipe = self.recipe
        split = {"split_seed": recipe.evaluation.split_seed, "validation_rows": recipe.data.validation_rows}
        return {**split, "tuning_rows": recipe.tuning_rows if recipe.tuned else 0, "grid_rows": recipe.grid_rows}

    def key(self, unit: Unit) -> str:
        """Hash of a unit's identity."""
        if ("key", unit) not in self.known:
            self.known["key", unit] = sha256_json(self.wanted(unit))
        return self.known["key", unit]  # type: ignore[no-any-return]
