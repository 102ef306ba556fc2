"""The adapter around factors that were extracted, and the record of what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from plait.adapters.experts import member_of
from plait.adapters.heads import HeadFacts
from plait.adapters.lora import EXPERT, LINEAR, Adapter, LoraFactors
from plait.border.records import mapping, nested, optional
from plait.extraction.pairs import Matrix, Pair
from plait.extraction.spectrum import Extracted


@dataclass(frozen=True, slots=True)
class LeastKept:
    """The module of which the least is kept: a share of its squared change."""

    name: str
    energy_kept: float


@dataclass(frozen=True, slots=True)
class ModuleKept:
    """What is kept of one module: its rank, the norm of its change, and shares of its square, the second in the inputs' metric."""

    rank: int
    change: float
    energy_kept: float
    metric_kept: float | None = optional()


@dataclass(frozen=True, slots=True)
class ExtractionRecord:
    """Say what an extracted adapter keeps; energies are exact, from the factors as they are written.

    Args:
        modules, unchanged: How many changed, and how many did not.
        rank: The largest rank.
        energy_kept: 1 - sum |D - B A|^2 / sum |D|^2.
        relative_error: Square root of what is lost.
        metric_kept: Share kept in the metric of the inputs, where there are statistics.
        worst_module: The module of which the least is kept.
        by_module: The same of every module.
        dropped: Tensor that changed and is left out -> the relative size of its change.
        without_statistics: Modules that were cut without the metric.
        heads, task_type, base: As the adapter has them.
        verification_error: Difference of what was written, read again, from what is stated.
    """

    modules: int
    unchanged: int
    rank: int
    energy_kept: float
    relative_error: float
    metric_kept: float | None
    worst_module: LeastKept = nested(LeastKept)
    by_module: Mapping[str, ModuleKept] = mapping(ModuleKept)
    dropped: Mapping[str, float] = field(default_factory=dict)
    without_statistics: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    task_type: str | None = None
    base: str = ""
    verification_error: float | None = None


@dataclass(slots=True)
class Found:
    """Cuts of modules that changed, how many did not, and names and relative sizes of changes that are left out."""

    cuts: dict[str, Extracted] = field(default_factory=dict)
    of: dict[str, Matrix] = field(default_factory=dict)
    unchanged: int = 0
    dropped: dict[str, float] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)


def adapter_of_cuts(pair: Pair, found: Found, base: str, name: str) -> Adapter:
    """The adapter: factors, the head whole, and what PEFT has to know of routers and experts."""
    modules = {m: cut.factors for m, cut in found.cuts.items()}
    modules |= _quiet_experts(pair, found)
    cut = len(pair.prefix) + 1 if pair.prefix else 0
    if pair.is_tied:
        embedding = pair.name_of(pair.model.get_input_embeddings())[cut:]
        if embedding in modules:  # one weight, read at both ends
            f = modules[embedding]
            output = pair.name_of(pair.model.get_output_embeddings())[cut:]
            modules[output] = LoraFactors(f.B.T.contiguous(), f.A.T.contiguous(), 1.0, LINEAR)
    layers = {m for m, matrix in found.of.items() if pair.is_layer(matrix)}
    parameters = {p for m in modules if (member := member_of(m)) for p in [member[0]]}
    parameters |= {f"{m}.weight" for m, matrix in found.of.items() if matrix.kind == LINEAR and m not in layers}
    head = {p: pair.whole(0, p) for p in pair.heads}
    config = pair.model.config
    labels = tuple(config.id2label[i] for i in sorted(config.id2label)) if head and config.id2label else None
    facts = HeadFacts(labels, getattr(config, "problem_type", None), pair.task_type, pair.prefix)
    return Adapter(
        name=name,
        base=base,
        modules=dict(sorted(modules.items())),
        task_type=pair.task_type,
        prefix=pair.prefix,
        heads={name: head} if head else {},
        target_parameters=tuple(sorted(parameters)),
        fan_in_fan_out=any(m.transposed and m.kind == LINEAR for m in found.of.values()),
        head_facts={name: facts} if head else {},
    )


def _quiet_experts(pair: Pair, found: Found) -> dict[str, LoraFactors]:
    """Zeros for the experts that did not change beside some that did: a fused weight's factors are those of all."""
    changed = {m.parameter: found.cuts[m.module].factors for m in found.of.values() if m.kind == EXPERT}
    quiet = {}
    for matrix in pair.matrices():
        if matrix.parameter in changed and matrix.kind == EXPERT and matrix.module not in found.cuts:
            like = changed[matrix.parameter]
            A, B = like.A.new_zeros(1, like.shape[1]), like.B.new_zeros(like.shape[0], 1)
            quiet[matrix.module] = replace(like, A=A, B=B)
    return quiet


def record_of(found: Found, adapter: Adapter) -> ExtractionRecord:
    """Record what was extracted."""
    whole = sum(c.energy for c in found.cuts.values())
    lost = sum(c.lost for c in found.cuts.values())
    metric = [c for c in found.cuts.values() if c.metric is not None and c.metric_lost is not None]
    lost_in_metric = (
        sum(c.metric_lost or 0.0 for c in metric) / sum(c.metric or 0.0 for c in metric) if metric else None
    )
    worst = max(found.cuts, key=lambda m: found.cuts[m].lost / found.cuts[m].energy)
    return ExtractionRecord(
        modules=len(found.cuts),
        unchanged=found.unchanged,
        rank=adapter.rank,
        energy_kept=1 - lost / whole,
        relative_error=(lost / whole) ** 0.5,
        metric_kept=None if lost_in_metric is None else 1 - lost_in_metric,
        worst_module=LeastKept(worst, 1 - found.cuts[worst].lost / found.cuts[worst].energy),
        by_module={m: _row(c) for m, c in found.cuts.items()},
        dropped=dict(sorted(found.dropped.items())),
        without_statistics=tuple(found.plain),
        heads=tuple(sorted(adapter.heads)),
        task_type=adapter.task_type,
        base=adapter.base,
    )


def _row(cut: Extracted) -> ModuleKept:
    metric = 1 - cut.metric_lost / cut.metric if cut.metric and cut.metric_lost is not None else None
    return ModuleKept(cut.factors.rank, cut.energy**0.5, 1 - cut.lost / cut.energy, metric)
