"""What a merge loses at each rank: the curve between a small adapter that any server takes and the exact one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from plait.adapters.lora import Adapter
from plait.errors import UsageError
from plait.merging.folders import read_named, read_statistics_files
from plait.merging.metric_cut import InputMetric, cut_adapter, input_metric
from plait.merging.outcomes import RankCurve as RankCurve
from plait.merging.outcomes import RankRow
from plait.merging.plan import Plan
from plait.merging.planning import plan_merge
from plait.merging.record import loss_of
from plait.merging.scales import default_method
from plait.merging.spec import MergeSettings, MergeSpec

if TYPE_CHECKING:
    from plait.statistics.fisher import FisherDiagonal
    from plait.statistics.moments import Statistics


def rank_curve(
    adapters: Sequence[Adapter | Path | str],
    method: str | MergeSpec | None = None,
    *,
    statistics: Mapping[str, Statistics | FisherDiagonal | Path | str] | None = None,
    ranks: Sequence[int] | None = None,
    score: Callable[[Adapter], float] | None = None,
    **settings: Unpack[MergeSettings],
) -> list[RankRow]:
    """Merge once, cut to several ranks, and say what each loses.

    Args:
        adapters: Adapters or their folders (``NAME=DIR`` too).
        method: A name in `merge_methods()`, None for a default, or a whole `MergeSpec`.
        statistics: Task -> its statistics, or their file.
        ranks: Ranks to cut to; by default r, 2r, 4r and R, r the largest rank among the inputs and R that of the merge.
        score: Quality of an adapter, such as its mean metric; None leaves it out.
        settings: What else a `MergeSpec` holds, but the rank.
    """
    spec = MergeSpec.of(method, settings)
    if spec.rank is not None:
        raise UsageError("rank_curve takes ranks, not rank")
    read = [a if isinstance(a, Adapter) else read_named(a) for a in adapters]
    files = {t: f for t, f in (statistics or {}).items() if isinstance(f, Path | str)}
    opened: Any = {**(statistics or {}), **(read_statistics_files(files) or {})}
    method = spec.method or default_method(read, spec, opened, cuts=True)[0]
    plan = plan_merge(read, replace(spec, method=method), statistics=opened or None)
    whole = plan.run("merged")
    largest = max((a.rank for a in read), default=1)
    wanted = {min(n, whole.adapter.rank) for n in ranks or (largest, 2 * largest, 4 * largest, whole.adapter.rank)}
    metric = how = None
    if not plan.method.cuts_by:
        metric, how = input_metric(plan.adapters, plan.weights, opened, list(plan.common.modules))
    lost = whole.record.loss.discarded_energy
    return [replace(_row(plan, whole.adapter, rank, lost, score, metric), cut=how or None) for rank in sorted(wanted)]


def _row(
    plan: Plan,
    whole: Adapter,
    rank: int,
    lost_before: float,
    score: Callable[[Adapter], float] | None,
    metric: InputMetric | None,
) -> RankRow:
    adapter, losses = cut_adapter(whole, rank, metric)
    cut = adapter.modules
    kept = {m: metric.energy(m, f) for m, f in cut.items()} if metric else None
    lost = loss_of(cut, losses, kept).discarded_energy
    return RankRow(
        rank,
        discarded_energy=lost_before + (1 - lost_before) * lost,
        verification_error=plan.verification_error(cut),
        size_mb=sum(f.A.numel() + f.B.numel() for f in cut.values()) * 4 / 1e6,
        score=None if score is None else float(score(adapter)),
    )
