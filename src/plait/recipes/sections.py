"""The sections of a recipe: one strict model each; the field names are the YAML keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic import BaseModel as PydanticModel

from plait.adapters.naming import checked_name
from plait.border.checked import Json
from plait.border.multipliers import LARGEST, SMALLEST

if TYPE_CHECKING:
    from plait.merging.spec import MergeSpec as Spec

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Multiplier = Annotated[float, Field(ge=SMALLEST, le=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Index = Annotated[int, Field(ge=0, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Strict(PydanticModel):
    """A mapping without unknown keys, frozen, of the types it says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _distinct(scales: list[float]) -> list[float]:
    if twice := [s for s in scales if scales.count(s) > 1]:
        raise ValueError(f"scale {twice[0]:g} stands twice")
    return sorted(scales)


def _once(values: list[str]) -> list[str]:
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ValueError(f"{twice[0]!r} stands twice")
    return values


Once = Annotated[list[str], Field(min_length=1, max_length=100_000), AfterValidator(_once)]
OneOrMore = Annotated[Once, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Name = Annotated[str, AfterValidator(checked_name)]
Share = Annotated[float, Field(ge=0, le=1)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Scales = Annotated[list[Multiplier], Field(min_length=1, max_length=200), AfterValidator(_distinct)]


PLAIN_ARMS = ("kaiming", "gaussian")  # the starts people use today: what "alone" means to somebody who has no plait


class BaseSpec(Strict):
    """The base model."""

    model: str = Field(min_length=1, description="hub name or local folder")
    revision: str | None = Field(None, description="branch, tag or commit of a base on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what its weights are held in")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = Field(
        "auto", description="auto takes a GPU where there is one"
    )
    four_bits: Literal["nf4", "nf4-single"] | None = Field(
        None, description="linear layers rounded to NF4 as QLoRA has them; nf4-single without double quantisation"
    )


class DataSpec(Strict):
    """Which rows, and how long."""

    root: str | None = Field(None, description="folder of local files; GLUE tasks come from the hub without it")
    train_rows: Count | None = Field(None, description="training rows a task, drawn by the seed; all without it")
    validation_rows: Count | None = Field(None, description="validation rows a task; all without it")
    selection_rows: Count | None = Field(
        None, description="training rows kept back to choose each adapter's best moment by (training.evaluate_every)"
    )
    max_length: Annotated[int, Field(ge=4, le=1 << 20)] = Field(
        128, description="tokens a row may have; of longer ones the rest is cut, and `plait plan` counts them"
    )


class TaskSpec(Strict):
    """A task that is not one of GLUE's."""

    name: Name = Field(description="what the task, its adapter and its head are called")
    train: str = Field(description="csv, tsv, jsonl or parquet file, or hub:NAME[@REVISION][:CONFIG[:SPLIT]]")
    validation: str | None = Field(None, description="held-out rows; every fifth training row without it")
    text: OneOrMore = Field(description="columns of the text: one, two for a pair, more for a template")
    label: str = Field("label", min_length=1, description="column of the label or the answer")
    kind: Literal["classification", "regression", "causal", "seq2seq"] = Field(
        "classification", description="a head that classifies or measures, or a model that answers in words"
    )
    labels: Once | None = Field(None, description="names of the classes, or all answers there are, in order")
    metrics: OneOrMore | None = Field(None, description="what is scored; the kind's own without it")
    template: str | None = Field(
        None, description='prompt around the columns of a text task, such as "{review}\\nThe reviewer is"'
    )
    chat: Literal["prompt", "messages"] | None = Field(None, description="use the tokenizer's chat template (causal)")
    stop: Annotated[str, Field(min_length=1)] | None = Field(None, description="where a written answer ends")
    extract: str | None = Field(None, description="regular expression: the part of an answer that is compared")
    compare: Literal["exact", "case", "squad", "number"] | None = Field(
        None, description="how written answers are compared"
    )
    references: str | None = Field(
        None, description="column with a list of right answers beside the label; the best of them counts"
    )
    empty: Literal["skip"] | None = Field(
        None, description="skip: leave rows with an empty cell out; by default they are refused"
    )


class LoraSpec(Strict):
    """The shape of every adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="rows of A (PEFT's r)")
    alpha: Multiplier = Field(16.0, description="the update is alpha / rank * B A (PEFT's lora_alpha)")
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

    samples: Count = Field(100, description="training rows a task that statistics are taken from")
    pool: Literal["token", "mean"] = Field("token", description="every token counts, or the mean of each row")
    batch_size: Count = Field(16, description="rows a forward pass")
    sketch: Count | None = Field(None, description="keep this many directions per site instead of the whole moment")
    memory: Annotated[str, Field(pattern=r"(?i)^\s*\d+(\.\d+)?\s*([kmgt]i?)?b?\s*$")] | Count | None = Field(
        None, description="bytes for the sums, such as 2GB: exact, layer groups or a sketch is chosen by it"
    )
    output_gradients: bool = Field(
        False, description="second moments of the gradients at every module's output too: K-FAC's other half"
    )

    @property
    def follows_batches(self) -> bool:
        """Whether `batch_size` changes the result: heads and answers are drawn by batches, and a sketch lets go of rows by batches."""
        return self.output_gradients or self.sketch is not None or self.memory is not None

    @model_validator(mode="after")
    def _held_whole(self) -> StatisticsSpec:
        if self.output_gradients and self.memory is not None:
            raise ValueError("memory is for moments of inputs alone; with output_gradients use sketch")
        if self.sketch is not None and self.memory is not None:
            raise ValueError("memory chooses the form itself; leave out sketch, or give sketch alone")
        return self


class ArmSpec(Strict):
    """One way of starting A and of training, with what it may differ in from the recipe's own settings."""

    name: Name = Field(description="what the arm is called in tables and folders")
    subspace: str | None = Field(None, description="a subspace method; by default the arm's name")
    row_norm: Positive | None = Field(None, description="length of A's rows; the subspace's own without it")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the subspace method")
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of `training` for this arm")
    pool: Literal["token", "mean"] | None = Field(None, description="of its statistics")
    samples: Count | None = Field(None, description="rows its statistics are taken from")
    known: Count | None = Field(None, description="how many of the other tasks it knows: the next ones in the list")
    background: Share = Field(0.0, description="share of the background tasks among the others")
    rank: Count | None = Field(None, description="its rank, where it is not the recipe's")
    rates: list[Positive] | None = Field(None, description="learning rates to choose from; the recipe's by default")
    like: Name | None = Field(None, description="takes its learning rate from this arm")
    snapshot: Count | None = Field(None, description="the moment after so many steps of arm `like`")
    joint: bool = Field(False, description="one adapter of all tasks, each task with its own head: a reference")
    seeds: Seeds | None = Field(None, description="its seeds, where they are not the recipe's")

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
            raise ValueError("a snapshot is of another arm's training: say which arm with `like`")
        return self


class MergeSpec(Strict):
    """One way of merging."""

    name: Name = Field(description="what the merge is called in tables and folders")
    method: str | None = Field(None, description="a merge method; by default the merge's name")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the merge method")
    calibrate: str | None = Field(
        None,
        description="pico: shrink the directions that adapters share first; svc: those that several added to, afterwards",
    )
    rank: Count | None = Field(None, description="rank to cut the merge to; uncut without it")
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

    scales: Scales = Field([0.3, 0.5, 0.7, 1.0, 1.5], description="grid of scales that every merge is scored at")
    batch_size: Count = Field(64, description="rows a forward pass")
    split_seed: Seed = Field(
        0, description="how validation rows are halved: scales are chosen on one, reported on the other"
    )
    resamples: Annotated[int, Field(ge=0, le=100_000)] = Field(400, description="bootstrap draws behind an interval")
    grow: bool | None = Field(None, description="grow the grid until the best scale is inside; default: where tuned")


class Variant(Strict):
    """An ablation: the recipe with some settings changed, for some arms, at their own learning rates."""

    name: Name = Field(description="what the ablation is called in tables and folders")
    set: dict[str, Any] = Field(min_length=1, description="dotted key -> value")
    arms: list[Name] = Field(min_length=1, description="arms that are trained again with these settings")
    merges: list[Name] | None = Field(None, description="merges of these; all without it")
    seeds: Seeds | None = Field(None, description="its seeds, where they are not the recipe's")


class Repair(Strict):
    """A reference: a merge trained further on all tasks together."""

    arms: list[Name] = Field(min_length=1, description="arms whose merge is repaired")
    merge: Name = Field(description="the merge that is trained further")
    steps: Count = Field(100, description="steps on all tasks together")
