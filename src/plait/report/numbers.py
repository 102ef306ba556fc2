"""An account as JSON: what a study publishes, and what a report holds besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from plait.report.account import Account
from plait.report.table import Row, mean
from plait.runs.folder import published
from plait.runs.recipe import Recipe

__all__ = ["SCHEMA", "finite", "headline_of", "published_tables", "report_tables"]
SCHEMA = 2  # of report.json; 1 was of runs that scored one half


def headline_of(account: Account) -> dict[str, Any]:
    """Give the figures a script wants: percent, shares as ratios, None where they are not defined; by arm, then by merge.

    Returns:
        `individual` (by arm), `floor`; `merged`, `recovered` (of plain), both with `_standard_error` over seeds and examples,
        `recovered_of_own`, `scale` (geometric mean of those chosen) and `worst_task` (a name, and points against its own
        adapter): means over seeds.
    """
    arms = list(dict.fromkeys(r.arm for r in account.plain_rows))

    def table(value: Callable[[list[Row]], Any]) -> dict[str, dict[str, Any]]:
        return {a: {m: value(mine) for m in account.merges if (mine := account.of(a, m))} for a in arms}

    def worst(mine: list[Row]) -> tuple[str, float]:
        row = min(mine, key=lambda r: r.worst_task)
        return row.worst, row.worst_task

    headline = {
        "individual": {a: mean(r.individual for r in account.plain_rows if r.arm == a) for a in arms},
        "floor": mean(r.floor for r in account.plain_rows),
        "merged": table(lambda mine: mean(r.merged for r in mine)),
        "merged_standard_error": table(lambda mine: account.spread(mine[0]).merged),
        "recovered": table(lambda mine: mean(r.recovered for r in mine)),
        "recovered_standard_error": table(lambda mine: account.spread(mine[0]).recovered),
        "recovered_of_own": table(lambda mine: mean(r.recovered_of_own for r in mine)),
        "scale": table(lambda mine: math.exp(mean(math.log(r.scale_selected) for r in mine))),
        "worst_task": table(worst),
    }
    return {name: finite(value) for name, value in headline.items()}


def report_tables(account: Account) -> dict[str, Any]:
    """Give the JSON of a report: the headline, what a study publishes, and what only the page shows."""
    return {
        "schema": SCHEMA,
        "headline": headline_of(account),
        "reference": account.reference,
        "notes": list(account.notes),
        **published_tables(account),
        "tasks": finite([asdict(t) for t in account.tasks], 6),
        "curves": finite([asdict(c) for c in account.curves], 6),
        "interference": finite(account.interference, 6),
    }


def published_tables(account: Account) -> dict[str, Any]:
    """Give the tables of a study as its JSON file publishes them, six figures a number."""
    intervals = account.inference.intervals
    best = [asdict(b) | {"interval": intervals.get(b.arm)} for b in account.best]
    tables = {
        "name": account.recipe.name,
        "about": account.about,
        "study": _told(account.recipe),
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


def _told(recipe: Recipe) -> dict[str, Any]:
    """The study as it is published."""
    told: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    told["base"]["model"] = published(recipe.base.model)
    told.get("data", {}).pop("root", None)
    return told


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
