"""What a recipe may say: one strict model per section; the field names are the YAML keys.

One model serves everything that is run: `Settings` is what any single stage needs, `Recipe` adds arms, merges and seeds, and a
recipe with `rates` is tuned, that is, a study: its learning rates are chosen by a sweep on rows of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic import BaseModel as PydanticModel

from plait.adapters.naming import checked_name, distinct_names
from plait.border.checked import LARGEST_NUMBER
from plait.errors import UsageError

if TYPE_CHECKING:
    from plait.training.settings import TrainingSettings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Index = Annotated[int, Field(ge=0, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(PydanticModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _distinct(scales: list[float]) -> list[float]:
    if len(set(scales)) != len(scales):
        raise ValueError("a scale stands twice")
    return sorted(scales)


def _once(values: list[str]) -> list[str]:
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ValueError(f"{twice[0]!r} stands twice")
    return values


Once = Annotated[list[str], Field(min_length=1, max_length=100_000), AfterValidator(_once)]
Name = Annotated[str, AfterValidator(checked_name)]
Share = Annotated[float, Field(ge=0, le=1)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Scales = Annotated[list[Positive], Field(min_length=1, max_length=200), AfterValidator(_distinct)]


PLAIN_ARMS = ("kaiming", "gaussian")  # the starts people use today: what "alone" means to somebody who has no plait


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_NUMBER


class BaseSpec(_Strict):
    """The base model."""

    model: str = Field(min_length=1, description="hub name or local folder")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"


class DataSpec(_Strict):
    """Which rows, and how long."""

    root: str | None = Field(None, description="folder of local files; GLUE tasks come from the hub without it")
    train_rows: Count | None = None
    validation_rows: Count | None = None
    selection_rows: Count | None = Field(
        None, description="training rows kept back to choose each adapter's best moment by (training.evaluate_every)"
    )
    max_length: Annotated[int, Field(ge=4, le=1 << 20)] = 128


class TaskSpec(_Strict):
    """A task that is not one of GLUE's."""

    name: Name
    train: str = Field(description="csv, tsv, jsonl or parquet file, or hub:NAME[:CONFIG[:SPLIT]]")
    validation: str | None = Field(None, description="held-out rows; every fifth training row without it")
    text: Once
    label: str = "label"
    kind: Literal["classification", "regression", "causal", "seq2seq"] = "classification"
    labels: Once | None = None
    metrics: Once | None = None
    template: str | None = None
    chat: Literal["prompt", "messages"] | None = Field(None, description="use the tokenizer's chat template (causal)")


class LoraSpec(_Strict):
    """The shape of every adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Positive = 16.0
    target_modules: list[str] | str = Field(description="as PEFT's: suffixes, a regex over whole names, or all-linear")
    exclude_modules: list[str] | str | None = Field(None, description="as PEFT's")
    layers_to_transform: list[Index] | Index | None = Field(None, description="as PEFT's: numbers of layers, from 0")

    @property
    def limits(self) -> dict[str, Any]:
        """What narrows `target_modules`, where anything does."""
        return self.model_dump(include={"exclude_modules", "layers_to_transform"}, exclude_none=True)

    @property
    def recorded_targets(self) -> tuple[str, ...] | str | None:
        """`target_modules` for an adapter's config; None where they are narrowed: then it lists its modules."""
        if self.limits:
            return None
        return self.target_modules if isinstance(self.target_modules, str) else tuple(self.target_modules)


class StatisticsSpec(_Strict):
    """What is measured of every task before its adapter starts."""

    samples: Count = 100
    pool: Literal["token", "mean"] = "token"
    batch_size: Count = 16
    sketch: Count | None = Field(None, description="keep this many directions per site instead of the whole moment")
    memory: Annotated[str, Field(pattern=r"(?i)^\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*$")] | Count | None = Field(
        None, description="bytes for the sums, such as 2GB: exact, layer groups or a sketch is chosen by it"
    )


class ArmSpec(_Strict):
    """One way of starting A and of training, with what it may differ in from the recipe's own settings."""

    name: Name
    subspace: str | None = Field(None, description="a subspace method; by default the arm's name")
    row_norm: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of `training` for this arm")
    pool: Literal["token", "mean"] | None = Field(None, description="of its statistics")
    samples: Count | None = Field(None, description="rows its statistics are taken from")
    known: Count | None = Field(None, description="how many of the other tasks it knows: the next ones in the list")
    background: Share = Field(0.0, description="share of the background tasks among the others")
    rank: Count | None = None
    rates: list[Positive] | None = Field(None, description="learning rates to choose from; the recipe's by default")
    like: Name | None = Field(None, description="takes its learning rate from this arm")
    snapshot: Count | None = Field(None, description="the moment after so many steps of arm `like`")
    joint: bool = Field(False, description="one adapter of all tasks, each task with its own head: a reference")
    seeds: Seeds | None = None

    @property
    def method(self) -> str:
        """The subspace method."""
        return self.subspace or self.name

    @property
    def is_plain(self) -> bool:
        """Whether it is one that people without plait use, at whatever rate."""
        return self.name.partition("@")[0] in PLAIN_ARMS

    @model_validator(mode="after")
    def _alike(self) -> ArmSpec:
        if self.snapshot is not None and self.like is None:
            raise ValueError("snapshot needs `like`: whose moment?")
        return self


class MergeSpec(_Strict):
    """One way of merging."""

    name: Name
    method: str | None = Field(None, description="a merge method; by default the merge's name")
    options: dict[str, Any] = Field(default_factory=dict)
    calibrate: str | None = None
    rank: Count | None = None
    scales: Scales | None = Field(None, description="grid of this merge; by default evaluation.scales")

    @property
    def merge_method(self) -> str:
        """The merge method."""
        return self.method or self.name


class EvaluationSpec(_Strict):
    """How scales are chosen and scores are taken."""

    scales: Scales = Field([0.3, 0.5, 0.7, 1.0, 1.5])
    batch_size: Count = 64
    split_seed: Seed = 0
    resamples: Annotated[int, Field(ge=0, le=100_000)] = 400
    grow: bool | None = Field(None, description="grow the grid until the best scale is inside; default: where tuned")


class Variant(_Strict):
    """An ablation: the recipe with some settings changed, for some arms, at their own learning rates."""

    name: Name
    set: dict[str, Any] = Field(min_length=1, description="dotted key -> value")
    arms: list[Name] = Field(min_length=1)
    merges: list[Name] | None = None
    seeds: Seeds | None = None


class Repair(_Strict):
    """A reference: a merge trained further on all tasks together."""

    arms: list[Name] = Field(min_length=1)
    merge: Name
    steps: Count = 100


class Settings(_Strict):
    """What a single stage needs to know."""

    base: BaseSpec
    data: DataSpec = DataSpec()
    tasks: list[str | TaskSpec] = Field(min_length=1, description="GLUE names, or tasks described")
    lora: LoraSpec | None = None
    statistics: StatisticsSpec = StatisticsSpec()
    training: dict[str, Any] = Field({}, description="see plait.training.settings.TrainingSettings")
    evaluation: EvaluationSpec = EvaluationSpec.model_construct()

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
        merged = {**self.training, **own, "max_length": self.data.max_length}
        if "steps" in own:
            merged.pop("epochs", None)
        if "epochs" in own:
            merged.pop("steps", None)
        return TrainingSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()})


class Recipe(Settings):
    """A whole run; with `rates` a study, whose arms each choose their learning rate."""

    name: str = "run"
    description: str = ""
    lora: LoraSpec
    arms: list[str | ArmSpec] = Field(min_length=1)
    training: dict[str, Any] = Field(description="see plait.training.settings.TrainingSettings")
    merges: list[str | MergeSpec] = Field(min_length=1)
    fleet: Literal["auto", "always", "never"] = Field(
        "auto", description="train adapters together; auto: on a GPU, and wherever rates are chosen"
    )
    seeds: Seeds = [0]
    rates: list[Positive] | None = Field(None, min_length=1, description="learning rates every arm chooses from")
    moments: list[Count] = Field([], description="steps before the end that the sweep may choose too")
    tuning_seed: Seed = Field(1000, description="seed of the sweep; never reported")
    tuning_merges: list[Name] | None = Field(None, description="merges by whose best an arm's rate is chosen")
    tuning_rows: Count = Field(250, description="validation rows a task that only the sweep sees, a fifth at most")
    grid_rows: Count = Field(400, description="rows a half from which scales are chosen")
    background: list[TaskSpec] = Field([], description="tasks that only lend their statistics")
    repair: Repair | None = None
    variants: list[Variant] = []

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        checked_name(self.name, "recipe")
        distinct_names(self.task_names, "task")
        distinct_names([a if isinstance(a, str) else a.name for a in self.arms], "arm")
        if len({a.name for a in self.arm_specs}) < len(self.arm_specs):
            raise ValueError("a learning rate or a snapshot stands twice")
        distinct_names([m.name for m in self.merge_specs], "merge")
        distinct_names([v.name for v in self.variants], "variant")
        for merge in self.merge_specs:
            if merge.name in ("alone", "floor", "features"):
                raise ValueError(f"a merge cannot be called {merge.name!r}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed stands twice")
        choosing = any({**self.training, **a.training}.get("evaluate_every") for a in self.arm_specs)
        if choosing != (self.data.selection_rows is not None):
            raise ValueError(
                "training.evaluate_every chooses by data.selection_rows, rows that are neither trained on nor reported: "
                "give both or neither"
            )
        return self

    @model_validator(mode="after")
    def _sweep(self) -> Recipe:
        if self.tuned and self.tuning_seed in self.seeds:
            raise ValueError("the tuning seed is among the reported seeds")
        for arm in self.arm_specs:
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
    def arm_specs(self) -> list[ArmSpec]:
        """The arms, each as a mapping.

        A list of learning rates makes an arm ``NAME@lrRATE`` of each, and the snapshots of a training follow it as
        ``NAME@stepN``; neither can be mistaken for a name of the recipe, where @ is not allowed.
        """
        named = [ArmSpec(name=a) if isinstance(a, str) else a for a in self.arms]
        return [each for arm in named for rated in self.at_each_rate(arm) for each in (rated, *self._snapshots(rated))]

    def arm(self, name: str) -> ArmSpec:
        """The arm of a name."""
        return next(a for a in self.arm_specs if a.name == name)

    @property
    def first_arm(self) -> ArmSpec:
        """The arm by whose settings a single adapter is trained."""
        first = self.arms[0]
        return ArmSpec(name=first) if isinstance(first, str) else first

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
