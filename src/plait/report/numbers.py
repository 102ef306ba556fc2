"""An account as JSON: what a study publishes, and what a report holds besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from plait.report.account import Account
from plait.report.table import Row, mean
from plait.runs.folder import published

__all__ = ["SCHEMA", "Headline", "finite", "headline_of", "published_tables", "report_tables"]
ByMerge = Mapping[str, Mapping[str, float | None]]
T = TypeVar("T")
SCHEMA = 2  # of report.json; 1 was of runs that scored one half


@dataclass(frozen=True, slots=True)
class Headline:
    """The figures a script wants, means over seeds: percent, shares as ratios, None where they are not defined.

    Args:
        individual: Arm -> its adapters alone.
        floor: The bare base with the reference's heads.
        merged, recovered, recovered_of_own: Arm -> merge -> score, and shares of plain and of own.
        merged_standard_error, recovered_standard_error: Arm -> merge -> standard error over seeds and examples.
        scale: Arm -> merge -> geometric mean of the chosen scales.
        worst_task: Arm -> merge -> the task that loses most against its own adapter in any seed, and how many points.
    """

    individual: Mapping[str, float]
    floor: float
    merged: ByMerge
    merged_standard_error: ByMerge
    recovered: ByMerge
    recovered_standard_error: ByMerge
    recovered_of_own: ByMerge
    scale: ByMerge
    worst_task: Mapping[str, Mapping[str, tuple[str, float]]]


def headline_of(account: Account) -> Headline:
    """Average the rows of an account over seeds, by arm and merge."""
    arms = list(dict.fromkeys(r.arm for r in account.plain_rows))

    def table(value: Callable[[list[Row]], T]) -> dict[str, dict[str, T]]:
        return {a: {m: finite(value(mine)) for m in account.merges if (mine := account.of(a, m))} for a in arms}

    def worst(mine: list[Row]) -> tuple[str, float]:
        return min(((r.worst, r.worst_task) for r in mine), key=lambda pair: pair[1])

    return Headline(
        individual={a: mean(r.individual for r in account.plain_rows if r.arm == a) for a in arms},
        floor=mean({r.seed: r.floor for r in account.plain_rows}.values()),  # an arm may have fewer seeds than others
        merged=table(lambda mine: mean(r.merged for r in mine)),
        merged_standard_error=table(lambda mine: account.spread(mine[0]).merged),
        recovered=table(lambda mine: mean(r.recovered for r in mine)),
        recovered_standard_error=table(lambda mine: account.spread(mine[0]).recovered),
        recovered_of_own=table(lambda mine: mean(r.recovered_of_own for r in mine)),
        scale=table(lambda mine: math.exp(mean(math.log(r.scale_selected) for r in mine))),
        worst_task=table(worst),
    )


def report_tables(account: Account) -> dict[str, Any]:
    """Give the JSON of a report: the headline, what a study publishes, and what only the page shows."""
    return {
        "schema": SCHEMA,
        "headline": asdict(headline_of(account)),
        "reference": account.reference,
        "notes": [sentence for remark in account.remarks for sentence in remark.each],
        "measured": finite({task: asdict(m) for task, m in account.measured.items()}),
        **published_tables(account),
        "tasks": finite([asdict(t) for t in account.tasks], 6),
        "curves": finite([asdict(c) for c in account.curves], 6),
        "interference": finite(account.interference, 6),
    }


def published_tables(account: Account) -> dict[str, Any]:
    """Give the tables of a study as its JSON file publishes them, six figures a number."""
    intervals, recipe = account.inference.intervals, account.recipe
    told: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    told["base"]["model"] = published(recipe.base.model)
    told.get("data", {}).pop("root", None)  # whose folder it lies in is nobody's business
    best = [asdict(b) | {"interval": intervals.get(b.arm)} for b in account.best]
    tables = {
        "name": recipe.name,
        "about": account.about,
        "study": told,
        "undefined": account.undefined,
        "rows": [asdict(r) for r in account.rows],
        "best": best,
        "references": [asdict(r) for r in account.references],
        "sweep": account.sweep,
        "matched": [asdict(r) for r in account.matched],
        "resamples": account.resamples,
        "comparisons": [asdict(c) for c in account.inference.comparisons],
        "predictors": [asdict(p) for p in account.predictors],
        "scales": [asdict(c) for c in account.scales],
    }
    unrounded = ("name", "about", "study", "undefined")
    return {k: v if k in unrounded else finite(v, 6) for k, v in tables.items()}


def finite(value: Any, figures: int | None = None) -> Any:
    """Turn what JSON lacks into what it has: NaN and infinity into null, tuples into lists.

    Args:
        value: Anything that JSON can nest.
        figures: Significant figures of every float; all by default.

    >>> finite({"a": (1, 0.123456789, float("nan"))}, 3)
    {'a': [1, 0.123, None]}
    """
    if isinstance(value, Mapping):
        return {k: finite(v, figures) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v, figures) for v in value]
    if isinstance(value, float):
        rounded = value if figures is None else float(f"{value:.{figures}g}")
        return rounded if math.isfinite(value) else None
    return value
