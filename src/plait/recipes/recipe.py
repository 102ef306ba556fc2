"""What a recipe may say.

One model serves everything that is run: `Settings` is what any single stage needs, `Recipe` adds arms, merges and seeds, and a
recipe with `rates` is tuned, that is, a study: its learning rates are chosen by a sweep on rows of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from plait.adapters.naming import checked_name, distinct_names
from plait.border.checked import LARGEST_NUMBER
from plait.errors import UsageError
from plait.recipes.sections import (
    ArmSpec,
    BaseSpec,
    Count,
    DataSpec,
    EvaluationSpec,
    LoraSpec,
    MergeSpec,
    Name,
    Positive,
    Repair,
    Seed,
    Seeds,
    StatisticsSpec,
    Strict,
    TaskSpec,
    Variant,
)

if TYPE_CHECKING:
    from plait.training.settings import TrainingSettings

# What is wrong where one of the two is given alone.
CHOOSING = "training.evaluate_every chooses by data.selection_rows, rows that are neither trained on nor reported: give both or neither"


class Settings(Strict):
    """What a single stage needs to know."""

    base: BaseSpec = Field(description="the base model")
    data: DataSpec = Field(DataSpec(), description="which rows, and how long")
    tasks: list[str | TaskSpec] = Field(min_length=1, description="GLUE names, or tasks described")
    lora: LoraSpec | None = Field(None, description="the shape of every adapter")
    statistics: StatisticsSpec = Field(StatisticsSpec(), description="what is measured before an adapter starts")
    training: dict[str, Any] = Field({}, description="how adapters are trained (plait.training.TrainingSettings)")
    evaluation: EvaluationSpec = Field(
        EvaluationSpec.model_construct(), description="how scales are chosen and scores are taken"
    )

    @property
    def task_names(self) -> list[str]:
        """The tasks' names, in order."""
        return [t if isinstance(t, str) else t.name for t in self.tasks]

    @property
    def adapted(self) -> LoraSpec:
        """Which modules are adapted.

        Raises:
            UsageError: Nobody says it.
        """
        if self.lora is None:
            raise UsageError("which modules?", hint="--target-modules, or lora.target_modules in a recipe")
        return self.lora

    @property
    def first_arm(self) -> ArmSpec | None:
        """The arm by whose settings a single adapter is trained; None for the recipe's own."""
        return None

    def training_of(self, arm: ArmSpec | None) -> TrainingSettings:
        """The training of one arm: the recipe's, with the arm's overrides.

        Raises:
            UsageError: An unknown key or a value out of range.
        """
        from plait.training.settings import TrainingSettings

        own = arm.training if arm else {}
        merged: dict[str, Any] = {**self.training, **own, "max_length": self.data.max_length}
        if "steps" in own:
            merged.pop("epochs", None)
        if "epochs" in own:
            merged.pop("steps", None)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        return TrainingSettings(**values)


class Recipe(Settings):
    """A whole run; with `rates` a study, whose arms each choose their learning rate."""

    name: str = Field("run", description="what the run is called in its report")
    description: str = Field("", description="one sentence for its report")
    lora: LoraSpec = Field(description="the shape of every adapter")
    arms: list[str | ArmSpec] = Field(
        min_length=1, description="ways of starting and training: names of subspaces, or mappings"
    )
    training: dict[str, Any] = Field(description="how adapters are trained (plait.training.TrainingSettings)")
    merges: list[str | MergeSpec] = Field(min_length=1, description="names of merge methods, or mappings")
    fleet: Literal["auto", "always", "never"] = Field(
        "auto", description="train adapters together; auto: on a GPU, and wherever rates are chosen"
    )
    seeds: Seeds = Field([0], description="seeds; every arm is trained with each")
    rates: list[Positive] | None = Field(None, min_length=1, description="learning rates every arm chooses from")
    moments: list[Count] = Field([], description="steps before the end that the sweep may choose too")
    tuning_seed: Seed = Field(1000, description="seed of the sweep; never reported")
    tuning_merges: list[Name] | None = Field(None, description="merges by whose best an arm's rate is chosen")
    tuning_rows: Count = Field(250, description="validation rows a task that only the sweep sees, a fifth at most")
    grid_rows: Count = Field(400, description="rows a half from which scales are chosen")
    background: list[TaskSpec] = Field(
        [], description="tasks that only lend their statistics; their rows need no labels"
    )
    repair: Repair | None = Field(None, description="a merge trained further on all tasks: a reference")
    variants: list[Variant] = Field([], description="ablations")

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        checked_name(self.name, "recipe")
        distinct_names(self.task_names, "task")
        distinct_names([a.name for a in self.named_arms], "arm")
        if len({a.name for a in self.arm_specs}) < len(self.arm_specs):
            raise ValueError("a learning rate or a snapshot stands twice")
        distinct_names([m.name for m in self.merge_specs], "merge")
        distinct_names([v.name for v in self.variants], "variant")
        for merge in self.merge_specs:
            if merge.name in ("alone", "floor", "features"):
                raise ValueError(
                    f"a merge cannot be called {merge.name!r}: other scores go by that; give it another name"
                )
        if twice := [s for s in self.seeds if self.seeds.count(s) > 1]:
            raise ValueError(f"seed {twice[0]} stands twice")
        choosing = any({**self.training, **a.training}.get("evaluate_every") for a in self.arm_specs)
        if choosing != (self.data.selection_rows is not None):
            raise ValueError(CHOOSING)
        return self

    @model_validator(mode="after")
    def _sweep(self) -> Recipe:
        if self.tuned and self.tuning_seed in self.seeds:
            raise ValueError("the tuning seed is among the reported seeds")
        for arm in self.named_arms:
            several = isinstance({**self.training, **arm.training}.get("lr"), list)
            if self.tuned and several:
                raise ValueError(f"arm {arm.name!r}: training.lr is a list, and rates are what an arm chooses from")
            if arm.rates and not self.tuned:
                raise ValueError(f"arm {arm.name!r} has rates, and the recipe has none: no sweep to choose them by")
        if not self.tuned and (self.moments or self.tuning_merges):
            raise ValueError("moments and tuning_merges are of a sweep, and there are no rates to choose from")
        return self

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        arms = {a.name: a for a in self.arm_specs}
        merges = [m.name for m in self.merge_specs]
        for arm in arms.values():
            if arm.like is not None and (arm.like not in arms or arms[arm.like].like):
                raise ValueError(f"arm {arm.name!r} is like {arm.like!r}, which is no arm with a rate of its own")
            if arm.background and not self.background:
                raise ValueError(f"arm {arm.name!r} wants background, and there are no background tasks")
        wanted = [(n, "repair") for n in (self.repair.arms if self.repair else [])]
        wanted += [(n, f"variant {v.name}") for v in self.variants for n in v.arms]
        for name, who in wanted:
            if name not in arms:
                raise ValueError(f"{who}: no arm {name!r}")
        named = [*(self.tuning_merges or []), *([self.repair.merge] if self.repair else [])]
        for name in [*named, *(m for v in self.variants for m in v.merges or [])]:
            if name not in merges:
                raise ValueError(f"no merge {name!r}")
        return self

    @property
    def tuned(self) -> bool:
        """Whether each arm chooses its learning rate, by a sweep before anything is reported."""
        return self.rates is not None

    @property
    def grows(self) -> bool:
        """Whether grids of scales grow until they hold the best one."""
        return self.tuned if self.evaluation.grow is None else self.evaluation.grow

    @property
    def named_arms(self) -> list[ArmSpec]:
        """The arms as the recipe names them, each as a mapping."""
        return [ArmSpec(name=a) if isinstance(a, str) else a for a in self.arms]

    @property
    def arm_specs(self) -> list[ArmSpec]:
        """The arms, each as a mapping.

        A list of learning rates makes an arm ``NAME@lrRATE`` of each, and the snapshots of a training follow it as
        ``NAME@stepN``; neither can be mistaken for a name of the recipe, where @ is not allowed.
        """
        return [
            each
            for arm in self.named_arms
            for rated in self.at_each_rate(arm)
            for each in (rated, *self._snapshots(rated))
        ]

    def arm(self, name: str) -> ArmSpec:
        """The arm of a name."""
        return next(a for a in self.arm_specs if a.name == name)

    @property
    def first_arm(self) -> ArmSpec:
        """The arm by whose settings a single adapter is trained."""
        return self.named_arms[0]

    def at_each_rate(self, arm: ArmSpec) -> list[ArmSpec]:
        """An arm, or one for each of its learning rates where they are a list."""
        return at_each_rate(self, arm)

    def _snapshots(self, arm: ArmSpec) -> list[ArmSpec]:
        """The arms that are an arm at some steps of its training: merged and scored, never trained themselves."""
        steps = {**self.training, **arm.training}.get("snapshots")
        if arm.like is not None or not isinstance(steps, list) or not all(type(s) is int for s in steps):
            return []
        owner = {"subspace": arm.method, "like": arm.name}
        return [arm.model_copy(update={**owner, "name": f"{arm.name}@step{s}", "snapshot": s}) for s in steps]

    @property
    def merge_specs(self) -> list[MergeSpec]:
        """The merges, each as a mapping."""
        return [MergeSpec(name=m) if isinstance(m, str) else m for m in self.merges]

    def merge(self, name: str) -> MergeSpec:
        """The merge of a name."""
        return next(m for m in self.merge_specs if m.name == name)

    def scales_of(self, merge: MergeSpec) -> list[float]:
        """The grid of one merge, ascending."""
        return sorted(merge.scales or self.evaluation.scales)


def at_each_rate(settings: Settings, arm: ArmSpec) -> list[ArmSpec]:
    """An arm, or one for each of its learning rates where they are a list.

    Args:
        settings: Where the rates stand that the arm does not name itself.
        arm: The arm.
    """
    rates = {**settings.training, **arm.training}.get("lr")
    if not isinstance(rates, list) or not rates or not all(_is_rate(r) for r in rates):
        return [arm]  # `training_of` says what is wrong with the rest
    alike = {"subspace": arm.method} if len(rates) > 1 else {}
    names = [f"{arm.name}@lr{rate:g}" if alike else arm.name for rate in rates]
    return [
        arm.model_copy(update={"name": name, "training": {**arm.training, "lr": rate}, **alike})
        for name, rate in zip(names, rates, strict=True)
    ]


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_NUMBER
