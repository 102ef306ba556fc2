"""What a merge records: of itself, of what it lost, and of every adapter that went into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.adapters.lora import Adapter, LoraFactors
from plait.border.records import inline, nested, optional
from plait.merging.module_weights import ModuleWeights

IN_THE_METRIC = (
    "so that the outputs on the tasks' inputs stay nearest, by their statistics"  # how a merge was cut, in its record
)


@dataclass(frozen=True, slots=True)
class MergedInput:
    """One adapter of a merge.

    Args:
        name: Name of its task.
        weight: Its weight; the default one, where weights differ by module.
        base, revision: The base model that it names.
        rank: The largest rank of its modules.
        task_type, prefix: As the adapter has them.
        facts: What else its `source` says: path, sha256, hub, format and so on.
    """

    name: str
    weight: float = 1.0
    base: str | None = None
    revision: str | None = None
    rank: int = 0
    task_type: str | None = None
    prefix: str = ""
    facts: Mapping[str, Any] = inline()

    @property
    def path(self) -> str:
        """Where it was read from; "" for one that was made in memory."""
        return str(self.facts.get("path", ""))

    @property
    def sha256(self) -> str:
        """Hash of its files; "" for one that was made in memory."""
        return str(self.facts.get("sha256", ""))

    @property
    def hub(self) -> str | None:
        """Its name and commit on the hub, where it came from there."""
        hub = self.facts.get("hub")
        return hub if isinstance(hub, str) else None


@dataclass(frozen=True, slots=True)
class ModuleLoss:
    """What the cut to a rank took from one module: a fraction of its energy, in [0, 1]."""

    name: str
    discarded_energy: float


@dataclass(frozen=True, slots=True)
class Loss:
    """What cuts to a rank took from a whole model.

    Args:
        discarded_energy: Fraction of the energy of all modules together, in [0, 1].
        worst_module: The module that lost the largest share; None where none lost any.
    """

    discarded_energy: float = 0.0
    worst_module: ModuleLoss | None = nested(ModuleLoss, None)


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapter of a stack, and what it was trained on."""

    name: str
    trained_on: str


@dataclass(frozen=True, slots=True)
class MergeRecord:
    """Say how a merge came to be.

    Args:
        method, method_reason: Name of the method, and why it was chosen where nobody named one.
        options: All its settings, defaults included; what it learnt, where it learns weights.
        weights: One per adapter, in the order in which they were given.
        module_weights: Weights by module pattern, where there are any.
        scale, scale_reason: Factor of the merged delta, and where it comes from; "" where it was given.
        seed, calibrate: As the spec has them.
        rank: The largest rank of a merged module.
        loss: What cuts to that rank took: of the weights' energy, or where `cut` says so of that of the outputs.
        cut: How it was cut, where statistics were given: so that outputs stay nearest, or by weights and why.
        verification_error: Largest relative error of the result on random inputs; None where nobody looked.
        missing: Adapter -> modules that it does not adapt.
        base, backbone_prefix, task_type: Of the result.
        tasks: Names of the adapters, in the order in which they were given.
        extras, beside: Whole weights and the adapter that each came from; and a line for each tensor beside the factors.
        labels: Head -> names of its classes, where any are known.
        adapters: The adapters, in the order in which they were given.
        format: Format of the files, where one was asked for or the inputs are no PEFT folders.
        stack: The adapters from the base upwards, where they were composed.
        per_task, rescalers, relative_error: Of a merge with a mask per task: that it is one, and of each task its factor and
            |masked merge - own delta| / |own delta|.
        by_difference: Hash of the merge that was changed ("from") and the adapters that were read for it ("changed").
        first_loss, last_loss: Of weights that were learnt.
        dtype: Type of the written factors where that is not float32.
        rounding_error: |D' - D| / |D| over all modules on random inputs, what rounding to that type took.
        texts: Task -> how many of its texts were read.
        notes: What a person should know, such as how many texts were read in part.
    """

    method: str = ""
    method_reason: str | None = optional()
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    module_weights: ModuleWeights | None = optional()
    scale: float = 1.0
    scale_reason: str = ""
    seed: int = 0
    calibrate: str | None = None
    rank: int = 0
    loss: Loss = inline(Loss)
    verification_error: float | None = None
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base: str = ""
    backbone_prefix: str = ""
    task_type: str | None = None
    tasks: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    labels: Mapping[str, Sequence[str]] | None = optional()
    adapters: tuple[MergedInput, ...] = nested(MergedInput, ())
    format: str | None = optional()
    stack: tuple[Layer, ...] = optional((), kind=Layer)
    per_task: bool = optional(False)
    rescalers: Mapping[str, float] | None = optional()
    relative_error: Mapping[str, float] | None = optional()
    by_difference: Mapping[str, Any] | None = optional()
    first_loss: float | None = optional()
    last_loss: float | None = optional()
    dtype: str | None = optional()
    rounding_error: float | None = optional()
    cut: str | None = optional()
    texts: Mapping[str, int] | None = optional()
    notes: tuple[str, ...] = optional(())


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged adapter and how it came to be.

    Args:
        adapter: The result; modules named relative to the backbone.
        record: What was done.
    """

    adapter: Adapter
    record: MergeRecord


def labels_of(adapters: Sequence[Adapter]) -> dict[str, Sequence[str]]:
    """Collect the class names of every head whose adapter's record tells them.

    PEFT's config names no classes, so that only heads that plait trained (or merged) have them.
    """
    return {head: names for a in adapters for head, names in a.classes.items()}


def loss_of(
    modules: Mapping[str, LoraFactors], lost: Mapping[str, float], kept: Mapping[str, float] | None = None
) -> Loss:
    """Add up what cuts to a rank took, and name the module that lost the largest share.

    Args:
        modules: After the cut.
        lost: Fraction that each lost, in [0, 1].
        kept: The energy of each, where it is known.
    """
    if not any(lost.values()):
        return Loss()
    if kept is None:
        kept = {m: f.norm_squared() for m, f in modules.items()}
    before = {m: kept[m] / (1 - lost[m]) if lost[m] < 1 else 0.0 for m in modules}
    total = sum(before.values())
    worst = max(lost, key=lambda m: lost[m])
    gone = sum(before[m] - kept[m] for m in modules) / total if total > 0 else 0.0
    return Loss(gone, ModuleLoss(worst, lost[worst]))


def as_given(
    adapters: Sequence[Adapter], weights: Sequence[float], given: Sequence[str]
) -> list[tuple[Adapter, float]]:
    """Pair adapters and weights in the order of the names that were given; as they stand where none are known."""
    pairs = list(zip(adapters, weights, strict=True))
    return sorted(pairs, key=lambda pair: given.index(pair[0].name)) if given else pairs


def input_hashes(adapters: Sequence[Adapter]) -> dict[str, str]:
    """List what a merge's identity says of its inputs: the hash of each, and the commit of those from the hub."""
    found = {f"adapter:{a.name}": str(a.source.get("sha256", "")) for a in adapters}
    return found | {f"hub:{a.name}": str(a.source["hub"]) for a in adapters if "hub" in a.source}


def input_of(adapter: Adapter, weight: float) -> MergedInput:
    """Record where an input came from."""
    facts = {k: v for k, v in adapter.source.items() if isinstance(v, str | int | float | bool | list | dict)}
    return MergedInput(
        str(facts.pop("name", adapter.name)),
        weight,
        adapter.base,
        adapter.revision,
        adapter.rank,
        adapter.task_type,
        adapter.prefix,
        facts,
    )
