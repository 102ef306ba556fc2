"""From adapters and a spec to a plan, everything checked; and the merge in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from plait.adapters.carried import require_exact
from plait.adapters.lora import Adapter
from plait.errors import InputError, UsageError
from plait.merging.align import align
from plait.merging.calibration import find_calibration
from plait.merging.metric_cut import InputMetric, input_metric
from plait.merging.module_weights import weights_of_modules
from plait.merging.plan import NEEDS, Plan
from plait.merging.record import Merged
from plait.merging.registry import MergeMethod, find_method
from plait.merging.scales import (
    DEFAULT_METHOD,
    SUMS,
    WEIGHTS_SAY,
    asks_moments,
    default_is_sum,
    default_method,
    reach_of,
    scale_by_moments,
)
from plait.merging.shared import with_one_root
from plait.merging.spec import MergeSettings, MergeSpec
from plait.merging.terms import require_multipliers, scale_of, weights_of
from plait.model.base import device_named
from plait.model.records import other_weights, same_weights
from plait.options import checked_options

if TYPE_CHECKING:
    from plait.statistics.fisher import FisherDiagonal
    from plait.statistics.moments import Statistics


def merge(
    adapters: Sequence[Adapter],
    method: str | MergeSpec | None = None,
    *,
    statistics: Mapping[str, Statistics | FisherDiagonal] | None = None,
    verify: bool = True,
    name: str = "merged",
    **settings: Unpack[MergeSettings],
) -> Merged:
    """Merge adapters of one base model into one adapter.

    Args:
        adapters: At least one; their names are the tasks' names.
        method: A name in `merge_methods()`, None for a default, or a whole `MergeSpec`.
        statistics: Task -> its statistics, for methods that need moments or a Fisher diagonal; a scale that nobody gives is
            then chosen by moments.
        verify: Whether random projections of the result are compared with the same projections of the inputs.
        name: Name of the result.
        settings: What else a `MergeSpec` holds: options, weights, scale, rank, calibrate, seed, device, base and so on.

    Returns:
        The adapter and its record. On the CPU the same inputs give the same bits.

    Raises:
        UsageError: Unknown method or option, or one out of range, weights that do not fit.
        InputError: Adapters of different bases or shapes, or statistics that are missing.
        RunError: A result that is not finite (the module is named).

    >>> import torch
    >>> from plait.adapters.lora import Adapter, LoraFactors
    >>> one, other = (
    ...     Adapter(n, "base", {"q": LoraFactors(torch.eye(2, 4), torch.eye(3, 2) * k)})
    ...     for n, k in (("a", 1), ("b", 2))
    ... )
    >>> merged = merge([one, other], "task_arithmetic", weights=[1.0, -1.0], scale=1.0)
    >>> merged.adapter.modules["q"].delta()
    tensor([[-1.,  0.,  0.,  0.],
            [ 0., -1.,  0.,  0.],
            [ 0.,  0.,  0.,  0.]])
    >>> merged.record.tasks
    ('a', 'b')
    """
    plan = plan_merge(adapters, method, statistics=statistics, **settings)
    merged = plan.run(name)
    if not verify:
        return merged
    error = plan.verification_error(merged.adapter.modules)
    return replace(merged, record=replace(merged.record, verification_error=error))


def plan_merge(
    adapters: Sequence[Adapter],
    method: str | MergeSpec | None = None,
    *,
    statistics: Mapping[str, Statistics | FisherDiagonal] | None = None,
    **settings: Unpack[MergeSettings],
) -> Plan:
    """Check everything about a merge; arguments as `merge` has them. Only a scale chosen by moments is computed here."""
    if other := next((a for a in adapters if not isinstance(a, Adapter)), None):
        raise UsageError(
            f"merge takes adapters, not {type(other).__name__}",
            hint="plait.read_adapter(PATH) reads one; plait.merge_folders takes paths",
        )
    spec = MergeSpec.of(method, settings)
    chosen, why = (spec.method, "") if spec.method else default_method(adapters, spec, statistics)
    found = find_method(chosen)
    options = checked_options(found, spec.options)
    if found.cuts_by and spec.rank is not None and options[found.cuts_by] is None:
        options[found.cuts_by] = spec.rank
    weights = weights_of(adapters, spec.weights)
    given = tuple(a.name for a in adapters)
    order = found.order_of(given, options)
    adapters, weights = with_one_root([adapters[i] for i in order]), tuple(weights[i] for i in order)
    common = align(adapters, spec.base, disjoint=spec.disjoint)
    if spec.rank is not None and spec.rank < 1:
        raise UsageError(f"rank is {spec.rank}, expected at least 1")
    by_module: dict[str, tuple[float, ...]] = {}
    if spec.module_weights is not None:
        if spec.weights is not None:
            raise UsageError(
                "weights per adapter and weights by module exclude each other", hint="default: in the file"
            )
        weights, by_module = weights_of_modules(spec.module_weights, adapters, list(common.modules))
    ruled = scale_of(found.name, spec, weights, by_module=bool(by_module))
    require_multipliers(adapters, weights, by_module, ruled.value, found.combination)
    summed = found.combination(weights) if found.combination and spec.calibrate is None and not by_module else None
    require_exact(adapters, None if summed is None else [c * ruled.value for c in summed], found.name)
    metric, how = _metric(spec, found, adapters, weights, statistics, list(common.modules))
    plan = Plan(
        spec=spec,
        method=found,
        options=options,
        common=common,
        adapters=tuple(adapters),
        weights=weights,
        statistics=_statistics(found, adapters, statistics),
        scale=ruled.value,
        scale_reason=ruled.reason,
        calibration=find_calibration(spec.calibrate),
        device=device_named(spec.device),
        by_module=by_module,
        given=given,
        metric=metric,
        cut_reason=how,
        method_reason=why,
    )
    return _scaled_by_moments(plan, statistics) if spec.scale is None and statistics else plan


def _metric(
    spec: MergeSpec,
    method: MergeMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    statistics: Mapping[str, Any] | None,
    modules: Sequence[str],
) -> tuple[InputMetric | None, str]:
    """The metric of a cut that was asked for, and how it is made; a method that itself cuts does it by weights."""
    if spec.rank is None or not statistics:
        return None, ""
    if method.cuts_by:
        return None, f"by weights, as {method.name} does"
    metric, how = input_metric(adapters, weights, statistics, modules)
    if metric is not None:
        first = adapters[0].name
        for adapter in adapters[1:]:
            _require_same_base(first, statistics.get(first), adapter.name, statistics.get(adapter.name))
    return metric, how


def require_use(spec: MergeSpec, statistics: Mapping[str, Any] | None, count: int, *, cuts: bool = False) -> None:
    """Refuse statistics that neither the method, the choice of a scale nor a cut would read.

    Args:
        spec: How is merged.
        statistics: What was given.
        count: How many adapters.
        cuts: Whether it is cut to ranks that the spec does not say.

    Raises:
        UsageError: Names the method.
    """
    method = spec.method or (SUMS[0] if default_is_sum(count, weighted=spec.is_weighted) else DEFAULT_METHOD)
    said = method in SUMS and spec.is_weighted
    scaled = spec.scale is None and asks_moments(method, spec.calibrate) and not said
    cut = (cuts or spec.rank is not None) and not find_method(method).cuts_by
    if statistics and not scaled and not cut and not find_method(method).needs:
        what = "the scale is given" if spec.scale is not None else WEIGHTS_SAY if said else ""
        why = "takes no statistics" + (f", and {what}" if what else "")
        named = "" if spec.method else ", or name a method that does: --method regmean"
        subject = method if spec.method or method in SUMS else "the default method"  # which depends on the adapters
        raise UsageError(f"{subject} {why}", hint=f"leave --stats out{named}")


def _scaled_by_moments(plan: Plan, statistics: Mapping[str, Any]) -> Plan:
    """The plan at the scale that the adapters' moments say, where they say one; merged once at scale 1 for it."""
    asked = asks_moments(plan.method.name, plan.spec.calibrate)
    counted = [a for a, w in zip(plan.adapters, plan.weights, strict=True) if w]
    if not asked or len(counted) < 2 or (plan.method.name in SUMS and plan.spec.is_weighted):
        return plan
    merged = replace(plan, scale=1.0).run("merged").adapter.modules
    reach, two_sided = reach_of(plan.method.name, plan.spec.calibrate), "output_gradients" in plan.method.needs
    scale = scale_by_moments(counted, merged, statistics, reach, two_sided=two_sided)
    if scale is None:  # said, since somebody gave statistics
        lacking = [a.name for a in counted if not hasattr(statistics.get(a.name), "moments_for")]
        why = f"there are none for {', '.join(lacking)}" if lacking else "they are of other modules, or see no change"
        return replace(plan, scale_reason=f"{plan.scale_reason} (statistics say no scale: {why})")
    return replace(plan, scale=scale.value, scale_reason=scale.reason)


def _statistics(
    method: MergeMethod, adapters: Sequence[Adapter], statistics: Mapping[str, Any] | None
) -> tuple[Any, ...]:
    if not method.needs:
        return ()
    given = statistics or {}
    needed = " and ".join(need.replace("_", " ") for need in method.needs)
    how = " fisher" if "fisher" in method.needs else " --output-gradients" if "output_gradients" in method.needs else ""
    if lacking := [a.name for a in adapters if a.name not in given]:
        raise UsageError(
            f"{method.name} needs {needed} of every task; none given for {', '.join(lacking)}"
            + (f"; there are some for {', '.join(given)}" if given else ""),
            hint=f"plait stats{how} collects them; pass --stats TASK=FILE",
        )
    for adapter in adapters:
        for need in method.needs:
            if not _holds(given[adapter.name], need):
                words = need.replace("_", " ")
                raise UsageError(
                    f"{method.name} needs {words}; the statistics of {adapter.name!r} hold none",
                    hint=f"plait stats{how} collects them",
                )
    ordered = [given[a.name] for a in adapters]
    for adapter, other in zip(adapters[1:], ordered[1:], strict=True):
        _require_same_base(adapters[0].name, ordered[0], adapter.name, other)
    return tuple(ordered)


def _holds(statistics: Any, need: str) -> bool:
    """Whether statistics are of the kind that holds a need; output gradients may be missing from a file of moments."""
    return hasattr(statistics, NEEDS[need]) and (need != "output_gradients" or bool(getattr(statistics, need, True)))


def _require_same_base(name: str, one: Any, other_name: str, other: Any) -> None:
    """Statistics of different bases, or pooled differently, do not compare; modules may differ as adapters' may."""
    a, b = getattr(one, "provenance", {}), getattr(other, "provenance", {})
    quantised = a.get("quantisation") != b.get("quantisation")
    pooled = a.get("pool") != b.get("pool") and None not in (a.get("pool"), b.get("pool"))
    based = not quantised and same_weights(a, b) is False
    if based:
        what = other_weights(f"that of {name!r}", a, f"that of {other_name!r}", b)
        raise InputError(f"statistics of different bases: {what}", hint="collect them with the adapters' base")
    if pooled:
        what = f"the statistics of {name!r} ({a['pool']}) and {other_name!r} ({b['pool']}) differ in pool"
        raise InputError(what, hint="collect them alike")
