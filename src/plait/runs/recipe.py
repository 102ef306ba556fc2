"""What a recipe may say: one strict model per section; the field names are the YAML keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic import BaseModel as PydanticModel

from plait.adapters.naming import checked_name, distinct_names
from plait.border.checked import LARGEST_NUMBER

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
    """One way of starting A and of keeping it while training."""

    name: Name
    subspace: str | None = Field(None, description="a subspace method; by default the arm's name")
    row_norm: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of `training` for this arm")

    @property
    def method(self) -> str:
        """The subspace method."""
        return self.subspace or self.name


class SnapshotArm(ArmSpec):
    """An arm as it was after some steps of its training: merged and scored as an arm of its own, never trained itself.

    Args:
        of: Name of the arm whose training leaves the adapters.
        step: After which optimiser step.
    """

    name: str
    of: str
    step: int


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


class Recipe(_Strict):
    """A whole run."""

    name: str = "run"
    description: str = ""
    base: BaseSpec
    data: DataSpec = DataSpec()
    tasks: list[str | TaskSpec] = Field(min_length=1, description="GLUE names, or tasks described")
    lora: LoraSpec
    statistics: StatisticsSpec = StatisticsSpec()
    arms: list[str | ArmSpec] = Field(min_length=1)
    training: dict[str, Any] = Field(description="see plait.training.settings.TrainingSettings")
    merges: list[str | MergeSpec] = Field(min_length=1)
    evaluation: EvaluationSpec = EvaluationSpec.model_construct()
    fleet: Literal["auto", "always", "never"] = Field("auto", description="train adapters together; auto: on a GPU")
    seeds: list[Seed] = Field([0], min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        checked_name(self.name, "recipe")
        distinct_names([t if isinstance(t, str) else t.name for t in self.tasks], "task")
        distinct_names([a if isinstance(a, str) else a.name for a in self.arms], "arm")
        if len({a.name for a in self.arm_specs}) < len(self.arm_specs):
            raise ValueError("a learning rate or a snapshot stands twice")
        distinct_names([m.name for m in self.merge_specs], "merge")
        for merge in self.merge_specs:
            if merge.name in ("alone", "floor"):
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

    @property
    def arm_specs(self) -> list[ArmSpec]:
        """The arms, each as a mapping.

        A list of learning rates makes an arm ``NAME@lrRATE`` of each, and the snapshots of a training follow it as
        ``NAME@stepN``; neither can be mistaken for a name of the recipe, where @ is not allowed.
        """
        given = [ArmSpec(name=a) if isinstance(a, str) else a for a in self.arms]
        return [each for arm in given for rated in self.at_each_rate(arm) for each in (rated, *self._snapshots(rated))]

    def at_each_rate(self, arm: ArmSpec) -> list[ArmSpec]:
        """An arm, or one for each of its learning rates where they are a list."""
        rates = {**self.training, **arm.training}.get("lr")
        if not isinstance(rates, list) or not rates or not all(_is_rate(r) for r in rates):
            return [arm]  # `training_of` says what is wrong with the rest
        alike = {"subspace": arm.method} if len(rates) > 1 else {}
        shown = [f"{arm.name}@lr{rate:g}" if alike else arm.name for rate in rates]
        return [
            arm.model_copy(update={"name": name, "training": {**arm.training, "lr": rate}, **alike})
            for name, rate in zip(shown, rates, strict=True)
        ]

    def _snapshots(self, arm: ArmSpec) -> list[SnapshotArm]:
        steps = {**self.training, **arm.training}.get("snapshots")
        if not isinstance(steps, list) or not all(type(s) is int for s in steps):
            return []
        described = arm.model_dump(exclude={"name", "subspace"}) | {"subspace": arm.method, "of": arm.name}
        return [SnapshotArm(name=f"{arm.name}@step{s}", step=s, **described) for s in steps]

    @property
    def merge_specs(self) -> list[MergeSpec]:
        """The merges, each as a mapping."""
        return [MergeSpec(name=m) if isinstance(m, str) else m for m in self.merges]

    def training_of(self, arm: ArmSpec) -> TrainingSettings:
        """The training of one arm: the recipe's, with the arm's overrides.

        Raises:
            UsageError: An unknown key or a value out of range.
        """
        from plait.training.settings import TrainingSettings

        merged = {**self.training, **arm.training, "max_length": self.data.max_length}
        if "steps" in arm.training:
            merged.pop("epochs", None)
        if "epochs" in arm.training:
            merged.pop("steps", None)
        return TrainingSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()})

    def scales_of(self, merge: MergeSpec) -> list[float]:
        """The grid of one merge, ascending."""
        return sorted(merge.scales or self.evaluation.scales)
