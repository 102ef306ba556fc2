"""One merge, planned: every module of all tasks through a method, cut to rank, checked, recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from plait.adapters.carried import recorded
from plait.adapters.lora import EXPERT, Adapter, LoraFactors, concatenated, truncated
from plait.adapters.memory import give_back
from plait.adapters.tensors import all_finite
from plait.errors import RunError, UsageError
from plait.merging.align import Alignment
from plait.merging.calibration import Calibration
from plait.merging.inputs import MergeInputs
from plait.merging.module_weights import ModuleWeights
from plait.merging.outcome import as_given, assembled, discarded, labels_of, provenance
from plait.merging.registry import MergeMethod
from plait.merging.stacks import groups_of, merged_group
from plait.merging.stream import DenseDelta, MergedDelta, Truncated, as_dense, cut_to_rank
from plait.merging.verify import probes_by_width, projection_error, some_modules, sum_error
from plait.merging.views import Views
from plait.merging.workers import one_by_one, side_by_side

S = TypeVar("S")
T = TypeVar("T")

# Entries of all deltas together from which threads of our own are worth starting: about four layers of a small encoder.
_LARGE = 1 << 22


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged adapter and how it came to be.

    Args:
        adapter: The result; modules named relative to the backbone.
        record: JSON-serialisable: method, options, weights, scale, rank, discarded_energy (of the whole model, in [0, 1]),
            verification_error, missing, adapters (provenance), backbone_prefix, tasks, labels (of heads whose classes are known).
    """

    adapter: Adapter
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """One merge, everything checked and nothing computed; arguments as `merge` has them.

    Adapters, weights and statistics stand as `MergeMethod.order_of` says; `given` has the names as they were given.
    `scale_reason` says where the scale comes from, "" where it was given. `module_weights` are weights by pattern, where there are
    any, and `by_module` what they are in each module. `decided` keeps what the method's `prepare` returned, so that verification
    does not run it again.
    """

    method: MergeMethod
    options: dict[str, Any]
    common: Alignment
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scale: float
    rank: int | None
    calibration: Calibration | None
    seed: int
    device: torch.device
    statistics: tuple[Any, ...]
    module_weights: ModuleWeights | None = None
    by_module: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scale_reason: str = ""
    given: tuple[str, ...] = ()
    decided: dict[str, Any] = field(default_factory=dict)

    def weights_in(self, module: str) -> tuple[float, ...]:
        """The weights that hold in one module."""
        return self.by_module.get(module, self.weights)

    def run(self, name: str) -> Merged:
        """Merge every module."""
        context = self.prepared()
        groups = groups_of(self)
        done = self.each(lambda names: merged_group(self, names, context), groups)
        found = {m: one for names, ones in zip(groups, done, strict=True) for m, one in zip(names, ones, strict=True)}
        modules = {m: found[m][0] for m in self.common.modules}
        record = self.record(modules, {m: found[m][1] for m in modules})
        return Merged(assembled(name, self.common, self.adapters, modules), record)

    def each(self, function: Callable[[S], T], names: Sequence[S]) -> list[T]:
        """The function of every module, or list of some, in order; side by side where that repays the threads."""
        if self.device.type != "cpu":
            return [function(m) for m in names]
        together = sum(o * i for (o, i), _ in self.common.modules.values()) > _LARGE and not self.copies()
        return side_by_side(function, names, self.device) if together else one_by_one(function, names)

    def prepared(self) -> Any:
        """What the method decides model-wide, before the first module."""
        if self.method.prepare and "context" not in self.decided:
            self.decided["context"] = self.method.prepare(Views(self.view, list(self.common.modules)), self.options)
            give_back()  # what a pass over the whole model needed, before the modules need theirs
        return self.decided.get("context")

    def verification_error(self, modules: Mapping[str, LoraFactors]) -> float:
        """Compare a result, wherever it was read from, with the inputs; see `verify`."""
        combination = None if self.calibration else self.method.combination
        summed = combination is not None
        context = None if summed else self.prepared()
        names = list(modules) if summed else some_modules(list(modules), self.seed)
        probes = probes_by_width(modules, self.seed) if summed else {}

        def wanted(x: MergeInputs) -> MergedDelta:
            return self.method.function(x, **self.options)

        def error(m: str) -> float:
            if summed and (parts := self.parts(m)) and modules[m].rank >= sum(f.rank for _, f in parts):
                return sum_error(parts, modules[m], probes[modules[m].shape[1]])
            x = self.view(m, context)
            right = combination(self.weights_in(m)) if combination else wanted
            return projection_error(x, modules[m], self.scale, right, self.calibration is not None)

        found = max(self.each(error, names), default=0.0)
        if not summed:
            give_back()
        return found

    def parts(self, module: str) -> list[tuple[float, LoraFactors]]:
        """What a method that has a `combination` adds up in one module: coefficient times scale, and factors as read."""
        if self.method.combination is None:
            raise ValueError(f"{self.method.name} is no weighted sum")
        pairs = zip(self.method.combination(self.weights_in(module)), self.adapters, strict=True)
        found = ((c, a.modules.get(module)) for c, a in pairs if c != 0.0)
        return [(c * self.scale, f) for c, f in found if f is not None and f.rank]

    def summed(self, module: str) -> LoraFactors:
        """One module of a method that `concatenates`, scale applied: straight from the factors as they were read."""
        (out, width), kind = self.common.modules[module]
        parts = self.parts(module) or [(1.0, _zero(out, width, 1, kind))]
        return concatenated([f for _, f in parts], [c for c, _ in parts], device=self.device)

    def view(self, module: str, context: Any) -> MergeInputs:
        """One module of all tasks, calibrated; factors are moved and folded here and released with the view."""
        (out, width), kind = self.common.modules[module]
        absent = _zero(out, width, 0, kind)
        raw = [a.modules.get(module, absent) for a in self.adapters]
        folded = [f.folded(torch.float32, self.device) for f in raw]
        x = MergeInputs(
            module=module,
            tasks=tuple(a.name for a in self.adapters),
            weights=self.weights_in(module),
            A=tuple(f.A for f in folded),
            B=tuple(f.B for f in folded),
            kind=kind,
            seed=self.seed,
            context=context,
            **self.needed(module, raw),
        )
        return self.calibration.before(x) if self.calibration else x

    def needed(self, module: str, raw: Sequence[LoraFactors]) -> dict[str, Any]:
        """The statistics of one module that the method declared; a task without the module needs none."""
        found: dict[str, Any] = {}
        getters = {"moments": "moments_for", "fisher": "diagonal_for"}
        for need in self.method.needs:
            per_task = []
            for adapter, statistics, factors in zip(self.adapters, self.statistics, raw, strict=True):
                one = getattr(statistics, getters[need])(module)
                if one is None and factors.rank:
                    raise UsageError(
                        f"the statistics of {adapter.name!r} hold no {need} for this module",
                        where=module,
                        hint="every expert reads tokens of its own inside one fused weight, and nothing can watch that; "
                        "choose a method without statistics"
                        if factors.kind == EXPERT
                        else "collect them with the adapters' target modules",
                    )
                per_task.append(one)
            found[need] = tuple(per_task)
        return found

    def merged(self, module: str, context: Any) -> tuple[LoraFactors, float]:
        """The module's merged factors on the CPU, scale applied, and the fraction of energy lost."""
        if self.is_unchanged():
            factors, lost = self.adapters[0].modules[module], 0.0
            return truncated(factors, self.rank) if self.rank else (factors, lost)
        try:
            if self.method.concatenates and not self.calibration:
                factors, lost = self.to_rank(self.summed(module))
            else:
                x = self.view(module, context)
                factors, lost = self.adjusted(self.method.function(x, **self.options), x)
        except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]  # LAPACK on NaN and infinity
            raise RunError(f"{self.method.name}: {e}", where=module, hint="huge factors multiply to infinity") from None
        return self.checked(factors, module), lost

    def checked(self, factors: LoraFactors, module: str) -> LoraFactors:
        """The module's merged factors on the CPU, of its kind (dense rows know none); finite."""
        factors = LoraFactors(factors.A.cpu(), factors.B.cpu(), 1.0, self.common.modules[module][1])
        if not all_finite(factors.A) or not all_finite(factors.B):
            raise RunError(
                f"{self.method.name} gave NaN or infinity", where=module, hint="a smaller --scale or other weights?"
            )
        return factors

    def adjusted(self, result: MergedDelta, x: MergeInputs) -> tuple[LoraFactors, float]:
        """A method's result, cut to rank, calibrated and scaled; and the fraction of energy lost."""
        factors, lost = self.cut(result, x)
        scale = self.scale
        if self.calibration:
            scale *= self.calibration.after(x, factors.norm_squared() ** 0.5)
        return (factors if scale == 1.0 else replace(factors, B=factors.B * scale)), lost

    def delta(self, module: str) -> DenseDelta:
        """The module's merged delta, scale applied, cut only where a rank was asked for: for baking."""
        if self.rank is not None:
            return as_dense(self.merged(module, self.prepared())[0])
        x = self.view(module, self.prepared())
        result = self.method.function(x, **self.options)
        dense = result if isinstance(result, DenseDelta) else as_dense(result)
        scale = self.scale
        if self.calibration:
            scale *= self.calibration.after(x, dense.energy() ** 0.5)
        return DenseDelta(dense.shape, lambda start, stop: (dense.rows(start, stop) * scale).cpu())

    def shell(self) -> Adapter:
        """The merged adapter's names, heads and kinds, its factors left out."""
        none = {m: _zero(0, 0, 1, kind) for m, (_, kind) in self.common.modules.items()}
        return assembled("merged", self.common, self.adapters, none)

    def settings(self) -> dict[str, Any]:
        """What identifies the merge beside its inputs and seed."""
        return {
            "method": self.method.name,
            "options": self.options,
            "order": [a.name for a in self.adapters],
            "weights": list(self.weights),
            "scale": self.scale,
            "rank": self.rank,
            "calibrate": self.calibration.name if self.calibration else None,
            "base": self.common.base,
            **({"disjoint": True} if self.common.disjoint else {}),
            **self.by_pattern(),
        }

    def by_pattern(self) -> dict[str, Any]:
        """Weights by module pattern for the record, where there are any."""
        if self.module_weights is None:
            return {}
        return {"module_weights": {name: dict(table) for name, table in self.module_weights.items()}}

    def copies(self) -> bool:
        """Whether factors are put beside each other and nothing else: a weighted sum that is neither cut nor calibrated."""
        return self.method.concatenates and self.rank is None and self.calibration is None

    def is_unchanged(self) -> bool:
        """One adapter of weight 1 through a linear method: its own factors, its own dtype, its own scaling."""
        alone = len(self.adapters) == 1 and self.scale == 1.0 and self.calibration is None and not self.by_module
        return alone and self.method.combination is not None and tuple(self.method.combination(self.weights)) == (1.0,)

    def cut(self, result: MergedDelta, x: MergeInputs) -> tuple[LoraFactors, float]:
        """Factors of a method's result at the wanted rank, and the fraction of energy lost."""
        if isinstance(result, DenseDelta):
            return cut_to_rank(result, self.rank or max(1, x.total_rank), x.generator("cut"), x.device)
        return self.to_rank(*((result.factors, result.lost) if isinstance(result, Truncated) else (result,)))

    def to_rank(self, factors: LoraFactors, lost: float = 0.0) -> tuple[LoraFactors, float]:
        """Factors at the wanted rank, where there is one; and the fraction of energy lost, with what was lost before."""
        shorter, more = truncated(factors, self.rank) if self.rank else (factors, 0.0)
        return shorter, lost + (1 - lost) * more

    def record(
        self, modules: Mapping[str, LoraFactors], lost: Mapping[str, float], kept: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """What was done, JSON-serialisable; `discarded_energy` is a fraction of the whole model's. `kept`: see `discarded`."""
        inputs = as_given(self.adapters, self.weights, self.given)
        return {
            "method": self.method.name,
            "options": dict(self.options),
            "weights": [w for _, w in inputs],
            **self.by_pattern(),
            "scale": self.scale,
            "scale_reason": self.scale_reason,
            "seed": self.seed,
            "calibrate": self.calibration.name if self.calibration else None,
            "rank": max((f.rank for f in modules.values()), default=0),
            **discarded(modules, lost, kept),
            "verification_error": None,
            "missing": dict(self.common.missing),
            "base": self.common.base,
            "backbone_prefix": self.common.backbone_prefix,
            "task_type": self.common.task_type,
            "tasks": [a.name for a, _ in inputs],
            **(recorded(self.common.carried) | labels_of(self.adapters)),
            "adapters": [provenance(a, w) for a, w in inputs],
        }


def _zero(out: int, width: int, rank: int, kind: str) -> LoraFactors:
    A, B = torch.zeros(rank, width, dtype=torch.float32), torch.zeros(out, rank, dtype=torch.float32)
    return LoraFactors(A, B, 1.0, kind)
