"""The page: one HTML file that needs nothing else, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.disk.store import versions
from plait.report import plots
from plait.report.summary import Estimate, Summary, summarise
from plait.runs.jobs import Plan
from plait.runs.session import Session
from plait.runs.stages import all_scores

SCHEMA = 1


def write_report(folder: Path, plan: Plan, session: Session) -> dict[str, Any]:
    """Write report.html, report.json and scores.parquet.

    Args:
        folder: An existing folder.
        plan: A plan whose scores are all on disk.
        session: For labels and tasks.

    Returns:
        The headline: individual, floor, merged and recovered by arm and merge.
    """
    from plait.evaluation.scores import write_parquet

    summary = summarise(plan, session)
    top = headline(summary)
    recipe = json.loads(plan.recipe.model_dump_json())
    data = {
        "schema": SCHEMA,
        "headline": top,
        "table": [asdict(line) for line in summary.lines],
        "per_task": summary.per_task,
        "curves": summary.curves,
        "interference": summary.interference,
        "notes": summary.notes,
        "recipe": recipe,
        "versions": versions(),
    }
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render(summary, plan), encoding="utf-8")
    write_parquet(folder / "scores.parquet", all_scores(plan))
    return _finite(top)  # type: ignore[no-any-return]


def headline(summary: Summary) -> dict[str, Any]:
    """The figures a script wants: percent, and `recovered` as a ratio (None where nothing was learned)."""
    arms = list(dict.fromkeys(line.arm for line in summary.lines))

    def by_arm(value: Any) -> dict[str, dict[str, Any]]:
        return {arm: {x.merge: value(x) for x in summary.lines if x.arm == arm} for arm in arms}

    return {
        "individual": {arm: next(x.alone.value for x in summary.lines if x.arm == arm) for arm in arms},
        "floor": summary.lines[0].floor.value,
        "merged": by_arm(lambda x: x.merged.value),
        "merged_standard_error": by_arm(lambda x: x.merged.error),
        "recovered": by_arm(lambda x: x.recovered.value if x.recovered else None),
        "recovered_standard_error": by_arm(lambda x: x.recovered.error if x.recovered else None),
        "scale": by_arm(lambda x: x.scales[0]),
        "worst_task": by_arm(lambda x: list(x.worst_task)),
    }


def render(summary: Summary, plan: Plan) -> str:
    """The page as HTML; every text from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("plait.report", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["points"] = points
    environment.filters["percent"] = percent
    return environment.get_template("page.html.j2").render(
        recipe=plan.recipe,
        base=plan.recipe.base.model,
        tasks=sorted(next(iter(summary.per_task.values()))),
        merges=[m.name for m in plan.recipe.merge_specs],
        summary=summary,
        bars=Markup(plots.bars(summary.lines)),
        curves=Markup(plots.curves(summary.curves)),
        heat=Markup(plots.heat_maps(summary.interference)),
        versions=versions(),
    )


def points(estimate: Estimate) -> str:
    """Percent with one decimal, and its standard error where known."""
    return f"{estimate.value:.1f}" + (f" ± {estimate.error:.1f}" if estimate.error is not None else "")


def percent(estimate: Estimate | None) -> str:
    """A ratio as percent, and its standard error where known."""
    if estimate is None:
        return "–"
    return f"{100 * estimate.value:.0f} %" + (f" ± {100 * estimate.error:.0f}" if estimate.error is not None else "")


def _finite(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
