"""Merging adapters in memory: align, loop over modules, cut to rank, check, and keep the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plait.adapters.carried import require_exact
from plait.adapters.lora import Adapter
from plait.border.checked import LARGEST_NUMBER, shown
from plait.errors import InputError, UsageError
from plait.merging.align import align
from plait.merging.calibration import find_calibration
from plait.merging.module_weights import ModuleWeights, weights_of_modules
from plait.merging.plan import Merged, Plan
from plait.merging.registry import MergeMethod, find_method
from plait.merging.scales import SUMS, Scale, asks_moments, default_method, scale_by_moments, scale_by_rule
from plait.model.base import device_named
from plait.model.records import same_weights
from plait.options import checked_options

if TYPE_CHECKING:
    from plait.statistics.fisher import FisherDiagonal
    from plait.statistics.moments import Statistics


def merge(
    adapters: Sequence[Adapter],
    method: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    statistics: Mapping[str, Statistics | FisherDiagonal] | None = None,
    rank: int | None = None,
    calibrate: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    verify: bool = True,
    base: str | None = None,
    disjoint: bool = False,
    name: str = "merged",
) -> Merged:
    """Merge adapters of one base model into one adapter.

    Args:
        adapters: At least one; their names are the tasks' names.
        method: A name in `merge_methods()`; None is `plait.merging.scales.default_method`.
        options: Of the method.
        weights: One per adapter, any sign; 1 each by default.
        scale: Multiplies the merged delta, whatever the method; None chooses one without labels (`plait.merging.scales`).
        statistics: Task -> its statistics, for methods that need moments or a Fisher diagonal; a scale that is to be
            chosen is chosen by moments.
        rank: Cut every module to this rank at most; None keeps exact results exact (rank R = sum of ranks) and cuts
            dense ones to R.
        calibrate: "pico" or None.
        seed: Of random masks and of the randomised SVD.
        device: Where to compute; the result is on the CPU.
        verify: Compare random projections of the result with the same projections recomputed from the inputs.
        base: Base id of the result where the adapters name one base by different names.
        disjoint: The adapters are meant side by side though they have no module in common.
        name: Of the result.

    Returns:
        The adapter and its record. On the CPU the same inputs give the same bits.

    Raises:
        UsageError: Unknown method or option, or one out of range, weights that do not fit.
        InputError: Adapters of different bases or shapes, or statistics that are missing.
        RunError: A result that is not finite (the module is named).
    """
    plan = plan_merge(
        adapters,
        method,
        options=options,
        weights=weights,
        scale=scale,
        statistics=statistics,
        rank=rank,
        calibrate=calibrate,
        seed=seed,
        device=device,
        base=base,
        disjoint=disjoint,
    )
    done = plan.run(name)
    if verify:
        done.record["verification_error"] = plan.verification_error(done.adapter.modules)
    return done


def plan_merge(
    adapters: Sequence[Adapter],
    method: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    statistics: Mapping[str, Statistics | FisherDiagonal] | None = None,
    rank: int | None = None,
    calibrate: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    base: str | None = None,
    disjoint: bool = False,
    module_weights: ModuleWeights | None = None,
) -> Plan:
    """Check everything about a merge; arguments as `merge` has them. Only a scale chosen by moments is computed here."""
    found = find_method(
        method or default_method(len(adapters), weighted=weights is not None or module_weights is not None)
    )
    chosen = checked_options(found, options)
    counted = _weights(adapters, weights)
    given = tuple(a.name for a in adapters)
    order = found.order_of(given, chosen)
    adapters, counted = [adapters[i] for i in order], tuple(counted[i] for i in order)
    common = align(adapters, base, disjoint=disjoint)
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}, expected at least 1")
    by_module: dict[str, tuple[float, ...]] = {}
    if module_weights is not None:
        if weights is not None:
            raise UsageError(
                "weights per adapter and weights by module exclude each other", hint="default: in the file"
            )
        counted, by_module = weights_of_modules(module_weights, adapters, list(common.modules))
    ruled = _ruled(found.name, calibrate, counted, scale, by_module=bool(by_module))
    summed = found.combination(counted) if found.combination and calibrate is None and not by_module else None
    require_exact(adapters, None if summed is None else [c * ruled.value for c in summed], found.name)
    plan = Plan(
        method=found,
        options=chosen,
        common=common,
        adapters=tuple(adapters),
        weights=counted,
        scale=ruled.value,
        scale_reason=ruled.reason,
        rank=rank,
        calibration=find_calibration(calibrate),
        seed=seed,
        device=device_named(device),
        statistics=_statistics(found, adapters, statistics),
        module_weights=module_weights,
        by_module=by_module,
        given=given,
    )
    return _scaled_by_moments(plan, statistics) if scale is None and statistics else plan


def _ruled(
    method: str, calibration: str | None, weights: Sequence[float], scale: float | None, *, by_module: bool
) -> Scale:
    """The scale that was given, or what the rule says."""
    if scale is not None:
        return Scale(_finite(scale, "scale"), "")
    if by_module and method in SUMS:
        return Scale(1.0, "the weights say how much of each is added")
    return scale_by_rule(method, calibration, weights)


def _scaled_by_moments(plan: Plan, statistics: Mapping[str, Any]) -> Plan:
    """The plan at the scale that the adapters' moments say, where they say one; merged once at scale 1 for it."""
    asked = asks_moments(plan.method.name, plan.calibration.name if plan.calibration else None)
    counted = [a for a, w in zip(plan.adapters, plan.weights, strict=True) if w]
    weighted = bool(plan.by_module) or any(w not in (0.0, 1.0) for w in plan.weights)
    if not asked or len(counted) < 2 or (plan.method.name in SUMS and weighted):
        return plan
    merged = replace(plan, scale=1.0).run("merged").adapter.modules
    found = scale_by_moments(counted, merged, statistics)
    return plan if found is None else replace(plan, scale=found.value, scale_reason=found.reason)


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise UsageError(
            f"{len(weights)} weights for {len(adapters)} adapters", hint="one weight per adapter, in their order"
        )
    return tuple(_finite(w, "weight") for w in weights)


def _finite(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
        raise UsageError(f"{what} is {shown(value)}, expected a finite number")
    return float(value)


def _statistics(
    method: MergeMethod, adapters: Sequence[Adapter], statistics: Mapping[str, Any] | None
) -> tuple[Any, ...]:
    if not method.needs:
        return ()
    given = statistics or {}
    if lacking := [a.name for a in adapters if a.name not in given]:
        raise UsageError(
            f"{method.name} needs {' and '.join(method.needs)} of every task; none given for {', '.join(lacking)}",
            hint=f"plait stats{' fisher' if 'fisher' in method.needs else ''} collects them; pass --stats TASK=FILE",
        )
    wanted = {"moments": "moments_for", "fisher": "diagonal_for"}
    for adapter in adapters:
        for need in method.needs:
            if not hasattr(given[adapter.name], wanted[need]):
                raise UsageError(f"{method.name} needs {need}; the statistics of {adapter.name!r} hold none")
    ordered = [given[a.name] for a in adapters]
    for adapter, other in zip(adapters[1:], ordered[1:], strict=True):
        _require_same_base(adapters[0].name, ordered[0], adapter.name, other)
    return tuple(ordered)


def _require_same_base(name: str, one: Any, other_name: str, other: Any) -> None:
    """Statistics of different bases, or pooled differently, do not compare; modules may differ as adapters' may."""
    a, b = getattr(one, "provenance", {}), getattr(other, "provenance", {})
    quantised = a.get("quantisation") != b.get("quantisation")
    pooled = a.get("pool") != b.get("pool") and None not in (a.get("pool"), b.get("pool"))
    based = not quantised and same_weights(a, b) is False
    for key in (*(["base_sha256"] if based else []), *(["pool"] if pooled else [])):
        raise InputError(f"the statistics of {name!r} and {other_name!r} differ in {key}", hint="collect them alike")
