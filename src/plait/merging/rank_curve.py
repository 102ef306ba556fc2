"""What a merge loses at each rank: the curve between a small adapter that any server takes and the exact one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter, LoraFactors, truncated
from plait.errors import UsageError
from plait.merging.driver import plan_merge
from plait.merging.folders import read_named, read_statistics_files
from plait.merging.outcome import discarded
from plait.merging.plan import Plan


def rank_curve(
    adapters: Sequence[Adapter | Path | str],
    method: str | None = None,
    *,
    ranks: Sequence[int] | None = None,
    score: Callable[[Adapter], float] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Merge once, cut to several ranks, and say what each loses.

    Args:
        adapters: Adapters or their folders (``NAME=DIR`` too).
        method: As `merge` has it.
        ranks: By default r, 2r, 4r and R, r the largest rank among the inputs and R that of the merge.
        score: Quality of an adapter, such as its mean metric; None leaves it out.
        settings: Other arguments of `plan_merge`; statistics may be files.

    Returns:
        Rows {"rank", "discarded_energy", "verification_error", "size_mb"} and "score" where one is asked for, by rank.
        `discarded_energy` counts from the method's own delta: for a dense result the cut to R is in it already.
        `verification_error` compares what is left after the cut with the inputs, as `merge` does.
    """
    read = [a if isinstance(a, Adapter) else read_named(a) for a in adapters]
    given = settings.pop("statistics", None)
    if given and all(isinstance(v, Path | str) for v in given.values()):
        given = read_statistics_files(given)
    if "rank" in settings:
        raise UsageError("rank_curve takes ranks, not rank")
    plan = plan_merge(read, method, statistics=given, **settings)
    whole = plan.run("merged")
    largest = max((a.rank for a in read), default=1)
    wanted = sorted(
        {min(n, whole.adapter.rank) for n in ranks or (largest, 2 * largest, 4 * largest, whole.adapter.rank)}
    )
    return [_row(plan, whole.adapter, rank, float(whole.record["discarded_energy"]), score) for rank in wanted]


def _row(
    plan: Plan, whole: Adapter, rank: int, lost_before: float, score: Callable[[Adapter], float] | None
) -> dict[str, Any]:
    cut: dict[str, LoraFactors] = {}
    lost: dict[str, float] = {}
    for module, factors in whole.modules.items():
        cut[module], lost[module] = truncated(factors, rank)
    lost_here = float(discarded(cut, lost)["discarded_energy"])
    numbers = sum(f.A.numel() + f.B.numel() for f in cut.values())
    row: dict[str, Any] = {
        "rank": rank,
        "discarded_energy": lost_before + (1 - lost_before) * lost_here,
        "verification_error": plan.verification_error(cut),
        "size_mb": numbers * 4 / 1e6,
    }
    if score is not None:
        shorter = {f: getattr(whole, f) for f in whole.__slots__} | {"modules": cut}
        row["score"] = float(score(Adapter(**shorter)))
    return row
