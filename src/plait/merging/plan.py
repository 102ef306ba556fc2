"""One merge, planned: every module of all tasks through a method, cut to rank, checked, recorded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from plait.adapters.lora import EXPERT, LoraFactors, concatenated, truncated, zero_factors
from plait.adapters.memory import give_back, let_go
from plait.adapters.tensors import all_finite
from plait.errors import RunError, UsageError
from plait.merging.align import assembled
from plait.merging.batched import grouped, most_together, stack_of
from plait.merging.calibration import Calibration
from plait.merging.dense import DenseDelta, MergedDelta, Truncated, cut_to_rank
from plait.merging.factors import FactorStack, PartingError
from plait.merging.inputs import MergeInputs
from plait.merging.light.sums import probes_by_width, sum_error
from plait.merging.metric_cut import InputMetric
from plait.merging.record import Merged, MergeRecord
from plait.merging.registry import MergeMethod
from plait.merging.rounding import Rounding
from plait.merging.terms import Terms
from plait.merging.verify import projection_error, some_modules
from plait.merging.views import Views
from plait.merging.workers import one_by_one, side_by_side

S = TypeVar("S")
T = TypeVar("T")

# What a method may need -> what statistics are asked for it with.
NEEDS = {"moments": "moments_for", "fisher": "diagonal_for", "output_gradients": "output_gradients_for"}
# Entries of all deltas together from which threads of our own are worth starting: about four layers of a small encoder.
_LARGE = 1 << 22


@dataclass(frozen=True, slots=True)
class Plan(Terms):
    """One merge, everything checked and nothing computed.

    Args:
        method: Its method, looked up.
        statistics: One each, in the order of the adapters.
        calibration: The step around the method, looked up.
        device: Where it is computed.
        metric: In which it is cut to rank; None for that of the weights.
        cut_reason: How it is cut, for a reader; "" where there is nothing to say.
        method_reason: Why it is this method, where nobody named one.
        answers: What the method computed over all modules, so that verification does not compute it again.
    """

    method: MergeMethod
    statistics: tuple[Any, ...]
    calibration: Calibration | None
    device: torch.device
    metric: InputMetric | None = None
    cut_reason: str = ""
    method_reason: str = ""
    answers: dict[Hashable, Any] = field(default_factory=dict)

    def run(self, name: str, took: Rounding | None = None) -> Merged:
        """Merge every module; in float32, or each rounded to a type as soon as it is there."""
        self.prepare()
        groups = self.groups()

        def together(names: Sequence[str]) -> list[tuple[LoraFactors, float]]:
            found = self.merged_together(names)
            return (
                found
                if took is None
                else [(took.stored(m, f), lost) for m, (f, lost) in zip(names, found, strict=True)]
            )

        results = self.each(together, groups)
        pairs = {
            m: pair for names, those in zip(groups, results, strict=True) for m, pair in zip(names, those, strict=True)
        }
        modules = {m: pairs[m][0] for m in self.common.modules}
        record = self.record(modules, {m: pairs[m][1] for m in modules})
        record = replace(record, method_reason=self.method_reason or None)
        record = record if took is None else took.noted(record)
        return Merged(assembled(name, self.common, self.adapters, modules), record)

    def groups(self) -> list[list[str]]:
        """List the modules, those that are computed together in one list; by shapes, ranks, kinds and order alone.

        A module that finds no other of its kind, and every module of a method that takes no stacks or of a merge with weights
        by module, is alone in its list.
        """
        if not self.method.stacks or self.by_module:
            return [[m] for m in self.common.modules]

        def kind_of(module: str) -> tuple[str, Hashable, int]:
            shape, kind = self.common.modules[module]
            ranks = tuple(f.rank for f in self.taking_part(module))
            return module, (shape, kind, ranks), most_together(shape, ranks)

        return grouped(map(kind_of, self.common.modules))

    def merged_together(self, names: Sequence[str]) -> list[tuple[LoraFactors, float]]:
        """Give what `merged` gives for each module, by one call of the method where that is possible.

        Where a numerical check fails for one of them, or LAPACK does, all are computed one by one: what becomes of a module
        depends on its neighbours by rounding at most, and an error names the one that it is about.
        """
        if len(names) > 1:
            try:
                views = [self.view(m) for m in names]
                stack = self.method.function(stack_of(views), **self.options)
                if not isinstance(stack, FactorStack):
                    raise TypeError(f"{self.method.name} takes stacks but gave {type(stack).__name__}")
                cut = [(x.module, *self.adjusted(part, x)) for part, x in zip(stack.members(), views, strict=True)]
                return [(self.checked(factors, module), lost) for module, factors, lost in cut]
            except (PartingError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                pass
        return [self.merged(m) for m in names]

    def each(self, function: Callable[[S], T], names: Sequence[S]) -> list[T]:
        """The function of every module, or list of some, in order; side by side where that repays the threads."""
        if self.device.type != "cpu":
            return [function(m) for m in names]
        together = sum(o * i for (o, i), _ in self.common.modules.values()) > _LARGE and not self.copies()
        return side_by_side(function, names, self.device) if together else one_by_one(function, names)

    def prepare(self) -> None:
        """Compute what the method decides over the whole model, with all threads, before the first module."""
        if self.method.ahead and not self.answers:
            self.method.ahead(self.view(next(iter(self.common.modules))), self.options)
            give_back()  # what a pass over the whole model needed, before the modules need theirs

    def verification_error(self, modules: Mapping[str, LoraFactors], *, mapped: bool = False) -> float:
        """Compare a result, wherever it was read from, with the inputs; see `verify`.

        Args:
            modules: The result.
            mapped: Whether it lies in a mapped file, and nothing reads it after this: then a module's pages are given back.
        """
        combination = None if self.calibration else self.method.combination
        summed = combination is not None
        if not summed:
            self.prepare()
        names = list(modules) if summed else some_modules(list(modules), self.seed)
        probes = probes_by_width({f.shape[1] for f in modules.values()}, self.seed) if summed else {}

        reshaped = self.calibration.reshaped if self.calibration else None

        def wanted(x: MergeInputs) -> MergedDelta:
            result = self.method.function(x, **self.options)
            return reshaped(x, self.cut(result, x)[0]) if reshaped else result

        def error(m: str) -> float:
            if summed and (parts := self.parts(m)) and modules[m].rank >= sum(f.rank for _, f in parts):
                found = sum_error(parts, modules[m], probes[modules[m].shape[1]])
                if mapped:
                    let_go(modules[m].A, modules[m].B)
                return found
            x = self.view(m)
            right = combination(self.weights_in(m)) if combination else wanted
            return projection_error(x, modules[m], self.scale, right, self.calibration is not None and not reshaped)

        largest = max(self.each(error, names), default=0.0)
        if not summed:
            give_back()
        return largest

    def summed(self, module: str) -> LoraFactors:
        """One module of a method that `concatenates`, scale applied: straight from the factors as they were read."""
        shape, kind = self.common.modules[module]
        parts = self.parts(module) or [(1.0, zero_factors(shape, 1, kind))]
        return concatenated([f for _, f in parts], [c for c, _ in parts], device=self.device)

    def taking_part(self, module: str) -> list[LoraFactors]:
        """Each adapter's factors in one module; of rank 0 where it does not adapt it, or weighs nothing there.

        A weight of 0 leaves an adapter out: its directions would otherwise shape what is made of the others (a polar factor, a threshold
        over all), and the rank would be counted with it.
        """
        shape, kind = self.common.modules[module]
        absent = zero_factors(shape, 0, kind)
        pairs = zip(self.adapters, self.weights_in(module), strict=True)
        return [a.modules.get(module, absent) if weight else absent for a, weight in pairs]

    def view(self, module: str) -> MergeInputs:
        """Give one module of all tasks, calibrated; factors are moved and folded here and released with the view."""
        kind = self.common.modules[module][1]
        raw = self.taking_part(module)
        folded = [f.folded(torch.float32, self.device) for f in raw]
        x = MergeInputs(
            module=module,
            tasks=tuple(a.name for a in self.adapters),
            weights=self.weights_in(module),
            A=tuple(f.A for f in folded),
            B=tuple(f.B for f in folded),
            kind=kind,
            seed=self.seed,
            model=Views(self.view, list(self.common.modules), self.answers),
            moments=self.needed("moments", module, raw),
            fisher=self.needed("fisher", module, raw),
            output_gradients=self.needed("output_gradients", module, raw),
        )
        return self.calibration.before(x) if self.calibration else x

    def needed(self, need: str, module: str, raw: Sequence[LoraFactors]) -> tuple[Any, ...]:
        """Give the statistics of one module, where the method declared that need; a task without the module needs none."""
        if need not in self.method.needs:
            return ()
        per_task = []
        for adapter, statistics, factors in zip(self.adapters, self.statistics, raw, strict=True):
            one = getattr(statistics, NEEDS[need])(module)
            if one is None and factors.rank:
                raise UsageError(
                    f"the statistics of {adapter.name!r} hold no {need.replace('_', ' ')} for this module",
                    where=module,
                    hint="every expert reads tokens of its own inside one fused weight, and nothing can watch that; "
                    "choose a method without statistics"
                    if factors.kind == EXPERT
                    else "collect them with the adapters' target modules",
                )
            per_task.append(one)
        return tuple(per_task)

    def merged(self, module: str) -> tuple[LoraFactors, float]:
        """The module's merged factors on the CPU, scale applied, and the fraction of energy lost."""
        if self.is_unchanged():
            return self.to_rank(self.adapters[0].modules[module], module)
        try:
            if self.method.concatenates and not self.calibration:
                factors, lost = self.to_rank(self.summed(module), module)
            else:
                x = self.view(module)
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
            factors = self.calibration.reshaped(x, factors) if self.calibration.reshaped else factors
            scale *= self.calibration.after(x, factors.norm_squared() ** 0.5)
        return (factors if scale == 1.0 else replace(factors, B=factors.B * scale)), lost

    def cut(self, result: MergedDelta, x: MergeInputs) -> tuple[LoraFactors, float]:
        """Factors of a method's result at the wanted rank, and the fraction of energy lost."""
        if isinstance(result, DenseDelta):
            cut = self.metric.cut(x.module, result, self.rank, x.device) if self.metric and self.rank else None
            near = [LoraFactors(A, B) for A, B in zip(x.A, x.B, strict=True)]
            return cut or cut_to_rank(result, self.rank or max(1, x.total_rank), x.generator("cut"), x.device, near)
        factors, lost = (result.factors, result.lost) if isinstance(result, Truncated) else (result, 0.0)
        return self.to_rank(factors, x.module, lost)

    def to_rank(self, factors: LoraFactors, module: str, lost: float = 0.0) -> tuple[LoraFactors, float]:
        """Factors at the wanted rank, where there is one; and the fraction of energy lost, with what was lost before."""
        if not self.rank:
            return factors, lost
        cut = self.metric.cut(module, factors, self.rank, factors.A.device) if self.metric else None
        shorter, more = cut or truncated(factors, self.rank)
        return shorter, lost + (1 - lost) * more

    def energy(self, module: str, factors: LoraFactors) -> float:
        """The energy of one module's result in the metric in which it was cut."""
        return self.metric.energy(module, factors) if self.metric else factors.norm_squared()

    def settings(self) -> dict[str, Any]:
        """List what identifies the merge; a cut in the metric of the inputs is another than one of the weights."""
        return {**Terms.settings(self), **({"cut": "inputs"} if self.metric else {})}

    def record(
        self, modules: Mapping[str, LoraFactors], lost: Mapping[str, float], kept: Mapping[str, float] | None = None
    ) -> MergeRecord:
        """Record what was done; energies are those of the metric in which it was cut."""
        if kept is None and any(lost.values()):
            kept = {m: self.energy(m, f) for m, f in modules.items()}
        record = Terms.record(self, modules, lost, kept)
        return replace(record, cut=self.cut_reason or None) if self.metric is None or any(lost.values()) else record
