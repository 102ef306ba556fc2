"""What a merge is, whatever computes it: its method's name, its weights and its scale, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from plait.adapters.carried import lines
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.unread import unread_lines
from plait.border.counts import plural
from plait.border.multipliers import LARGEST, checked_multiplier
from plait.errors import InputError, UsageError
from plait.loading.single_experts import single_expert_notes
from plait.merging.align import Alignment
from plait.merging.combinations import Combination
from plait.merging.record import MergeRecord, as_given, input_of, labels_of, loss_of
from plait.merging.scales import SUMS, WEIGHTS_SAY, Scale, scale_by_rule
from plait.merging.spec import MergeSpec

# From this factor on a merge says by what an update is multiplied.
_FAR = 100.0
_AT_MOST = f"expected at most {LARGEST:g} in size"


class Method(Protocol):
    """What has to be known of a method where it is not run."""

    @property
    def name(self) -> str:
        """What `--method` takes."""

    @property
    def combination(self) -> Combination | None:
        """Weights -> the factor of each delta, of a weighted sum; None of others."""

    @property
    def concatenates(self) -> bool:
        """Whether the result is that sum, factors beside each other."""


@dataclass(frozen=True, slots=True)
class Terms:
    """One merge, everything checked.

    Args:
        spec: What was asked for; rank, seed and weights by pattern are read off it.
        method: Its method.
        options: Its options, checked, with the defaults of the others.
        common: What the adapters have in common.
        adapters, weights: One each, as `MergeMethod.order_of` orders them.
        scale, scale_reason: Factor of the merged delta, and where it comes from; "" where it was given.
        by_module: Module -> weights, where they differ by module.
        given: Names of the adapters in the order in which they were given.
    """

    spec: MergeSpec
    method: Method
    options: dict[str, Any]
    common: Alignment
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    scale: float
    scale_reason: str
    by_module: Mapping[str, tuple[float, ...]]
    given: tuple[str, ...]

    @property
    def rank(self) -> int | None:
        """Rank to cut every module to, where one was asked for."""
        return self.spec.rank

    @property
    def seed(self) -> int:
        """Seed of what is drawn."""
        return self.spec.seed

    def weights_in(self, module: str) -> tuple[float, ...]:
        """The weights that hold in one module."""
        return self.by_module.get(module, self.weights)

    def parts(self, module: str) -> list[tuple[float, LoraFactors]]:
        """What a method that has a `combination` adds up in one module: coefficient times scale, and factors as read."""
        if self.method.combination is None:
            raise ValueError(f"{self.method.name} is no weighted sum")
        pairs = zip(self.method.combination(self.weights_in(module)), self.adapters, strict=True)
        found = ((c, a.modules.get(module)) for c, a in pairs if c != 0.0)
        return [(c * self.scale, f) for c, f in found if f is not None and f.rank]

    def settings(self) -> dict[str, Any]:
        """List what identifies the merge beside its inputs and seed, as JSON; `spec_of` reads it back."""
        table = self.spec.module_weights
        return {
            "method": self.method.name,
            "options": self.options,
            "order": [a.name for a in self.adapters],
            "weights": list(self.weights),
            "scale": self.scale,
            "rank": self.rank,
            "calibrate": self.spec.calibrate,
            "base": self.common.base,
            **({"disjoint": True} if self.common.disjoint else {}),
            **({} if table is None else {"module_weights": {name: dict(t) for name, t in table.items()}}),
        }

    def copies(self) -> bool:
        """Whether factors are put beside each other and nothing else: a weighted sum that is neither cut nor calibrated."""
        return self.method.concatenates and self.rank is None and self.spec.calibrate is None

    def is_unchanged(self) -> bool:
        """One adapter of weight 1 through a linear method: its own factors, its own dtype, its own scaling."""
        alone = len(self.adapters) == 1 and self.scale == 1.0 and self.spec.calibrate is None and not self.by_module
        return alone and self.method.combination is not None and tuple(self.method.combination(self.weights)) == (1.0,)

    def _experts(self) -> list[str]:
        return [*single_expert_notes({a.full_name(m) for a in self.adapters for m in a.modules})]

    def record(
        self, modules: Mapping[str, LoraFactors], lost: Mapping[str, float], kept: Mapping[str, float] | None = None
    ) -> MergeRecord:
        """Record what was done; `lost` and `kept` are as `loss_of` has them."""
        inputs = as_given(self.adapters, self.weights, self.given)
        return MergeRecord(
            method=self.method.name,
            options=dict(self.options),
            weights=tuple(w for _, w in inputs),
            scale=self.scale,
            scale_reason=self.scale_reason,
            rank=max((f.rank for f in modules.values()), default=0),
            loss=loss_of(modules, lost, kept),
            missing=dict(self.common.missing),
            base=self.common.base,
            backbone_prefix=self.common.backbone_prefix,
            task_type=self.common.task_type,
            tasks=tuple(a.name for a, _ in inputs),
            extras=dict(self.common.carried.whole_from),
            beside=(
                *lines(self.common.carried),
                *_unmoved(self.adapters),
                *_far(self),
                *self._experts(),
                *unread_lines(self.adapters),
            ),
            labels=labels_of(self.adapters) or None,
            adapters=tuple(input_of(a, w) for a, w in inputs),
            **{asked: getattr(self.spec, asked) for asked in ("seed", "calibrate", "module_weights")},
        )


def _unmoved(adapters: Sequence[Adapter]) -> list[str]:
    """Name adapters that change nothing; of others one module is enough to know."""
    still = (a.name for a in adapters if not any(f.norm_squared() for f in a.modules.values()))
    return [f"{name} changes nothing: its update is zero (not trained yet?)" for name in still]


def _far(terms: Terms) -> list[str]:
    """Say what is multiplied by so much that a number may have been mistyped: no measured merge needs a tenth of that."""
    if terms.method.combination is None:
        return [f"the scale is {terms.scale:g}: is that meant?"] if abs(terms.scale) >= _FAR else []
    tables = [terms.method.combination(t) for t in {terms.weights, *terms.by_module.values()}]
    most = {a.name: max((c[i] * terms.scale for c in tables), key=abs) for i, a in enumerate(terms.adapters)}
    return [f"{name}'s update is multiplied by {m:g}: is that meant?" for name, m in most.items() if abs(m) >= _FAR]


def scale_of(method: str, spec: MergeSpec, weights: Sequence[float], *, by_module: bool) -> Scale:
    """Take the scale that was given, or what the rule says; a sum whose weights were given, if only as 1 each, is what they say."""
    if spec.scale is not None:
        return Scale(checked_multiplier(spec.scale, "scale"), spec.scale_reason)
    if (by_module or (spec.is_weighted and any(weights))) and method in SUMS:
        return Scale(1.0, WEIGHTS_SAY)
    return scale_by_rule(method, spec.calibrate, weights)


def weights_of(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    """One weight per adapter, 1 each where none were given.

    Raises:
        UsageError: Another number of them, or one out of range.
    """
    if weights is None:
        return (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(
            f"{plural(len(weights), 'weight')} for {plural(len(adapters), 'adapter')}",
            hint="one weight per adapter, in their order",
        )
    return tuple(checked_multiplier(w, f"the weight of {a.name!r}") for a, w in zip(adapters, weights, strict=True))


def require_multipliers(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    by_module: Mapping[str, Sequence[float]],
    scale: float,
    combination: Combination | None,
) -> None:
    """Refuse an alpha that is too large, and weights, a scale and alphas that are so together.

    Args:
        adapters: Of the merge.
        weights: One each.
        by_module: Module -> weights, where they differ by module.
        scale: Factor of the merged delta.
        combination: Weights -> the factor of each delta, of a weighted sum; None of others, whose weights are taken as they are.

    Raises:
        InputError: An alpha, by itself.
        UsageError: The product.
    """
    tables = {tuple(weights), *map(tuple, by_module.values())}
    factors = [combination(table) if combination else table for table in tables]
    for i, adapter in enumerate(adapters):
        scalings = {f.scaling for f in adapter.modules.values() if f.rank}
        largest = max(scalings, key=abs, default=0.0)
        if abs(largest) > LARGEST:
            raise InputError(f"alpha / rank is {largest:g}, {_AT_MOST}", where=adapter.name)
        product = max((c[i] * scale * largest for c in factors), key=abs)
        if abs(product) > LARGEST:
            what = "weight times scale times alpha / rank" if scale != 1.0 else "weight times alpha / rank"
            raise UsageError(f"{what} of {adapter.name!r} is {product:g}, {_AT_MOST}")
