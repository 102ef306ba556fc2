"""The sections of a recipe: one strict model each; the field names are the YAML keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic import BaseModel as PydanticModel

from plait.adapters.naming import checked_name
from plait.border.checked import Json

if TYPE_CHECKING:
    from plait.merging.spec import MergeSpec as Spec

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Index = Annotated[int, Field(ge=0, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Strict(PydanticModel):
    """A mapping without unknown keys, frozen, of the types it says."""

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


class BaseSpec(Strict):
    """The base model."""

    model: str = Field(min_length=1, description="hub name or local folder")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"


class DataSpec(Strict):
    """Which rows, and how long."""

    root: str | None = Field(None, description="folder of local files; GLUE tasks come from the hub without it")
    train_rows: Count | None = None
    validation_rows: Count | None = None
    selection_rows: Count | None = Field(
        None, description="training rows kept back to choose each adapter's best moment by (training.evaluate_every)"
    )
    max_length: Annotated[int, Field(ge=4, le=1 << 20)] = 128


class TaskSpec(Strict):
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
    stop: Annotated[str, Field(min_length=1)] | None = Field(None, description="where a written answer ends")
    extract: str | None = Field(None, description="regular expression: the part of an answer that is compared")
    compare: Literal["exact", "case", "squad", "number"] | None = Field(
        None, description="how written answers are compared"
    )


class LoraSpec(Strict):
    """The shape of every adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Positive = 16.0
    target_modules: list[str] | str = Field(description="as PEFT's: suffixes, a regex over whole names, or all-linear")
    exclude_modules: list[str] | str | None = Field(None, description="as PEFT's")
    layers_to_transform: list[Index] | Index | None = Field(None, description="as PEFT's: numbers of layers, from 0")

    @property
    def limits(self) -> Json:
        """What narrows `target_modules`, where anything does."""
        return self.model_dump(include={"exclude_modules", "layers_to_transform"}, exclude_none=True)

    @property
    def recorded_targets(self) -> tuple[str, ...] | str | None:
        """`target_modules` for an adapter's config; None where they are narrowed: then it lists its modules."""
        if self.limits:
            return None
        return self.target_modules if isinstance(self.target_modules, str) else tuple(self.target_modules)


class StatisticsSpec(Strict):
    """What is measured of every task before its adapter starts."""

    samples: Count = 100
    pool: Literal["token", "mean"] = "token"
    batch_size: Count = 16
    sketch: Count | None = Field(None, description="keep this many directions per site instead of the whole moment")
    memory: Annotated[str, Field(pattern=r"(?i)^\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*$")] | Count | None = Field(
        None, description="bytes for the sums, such as 2GB: exact, layer groups or a sketch is chosen by it"
    )


class ArmSpec(Strict):
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


class MergeSpec(Strict):
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

    def spec(self, seed: int) -> Spec:
        """Say how to merge, at scale 1: the scale is chosen on scores."""
        from plait.merging.spec import MergeSpec as Spec

        return Spec(self.merge_method, self.options, scale=1.0, rank=self.rank, calibrate=self.calibrate, seed=seed)


class EvaluationSpec(Strict):
    """How scales are chosen and scores are taken."""

    scales: Scales = Field([0.3, 0.5, 0.7, 1.0, 1.5])
    batch_size: Count = 64
    split_seed: Seed = 0
    resamples: Annotated[int, Field(ge=0, le=100_000)] = 400
    grow: bool | None = Field(None, description="grow the grid until the best scale is inside; default: where tuned")


class Variant(Strict):
    """An ablation: the recipe with some settings changed, for some arms, at their own learning rates."""

    name: Name
    set: dict[str, Any] = Field(min_length=1, description="dotted key -> value")
    arms: list[Name] = Field(min_length=1)
    merges: list[Name] | None = None
    seeds: Seeds | None = None


class Repair(Strict):
    """A reference: a merge trained further on all tasks together."""

    arms: list[Name] = Field(min_length=1)
    merge: Name
    steps: Count = 100
