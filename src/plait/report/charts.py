"""What the charts of the HTML page show, out of an account."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from plait.report.account import Account
from plait.report.drawing import Dot, Line, Mark, Panel, dots_of, panels_of, room_for

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["charts_of"]
_FAR = 4.1  # multiples of the chosen scale beyond this say nothing of a slip
_LINES = {"joint training": "dashed", "best single adapter": "dashdot"}


def charts_of(account: Account, slots: Mapping[str, int]) -> dict[str, Markup]:
    """Draw what there is to draw.

    Args:
        account: The numbers.
        slots: Arm -> place in the palette; arms without one are grey.

    Returns:
        Section's figure -> HTML: `recovered`, `scales` or `curves`, `sweep`, as `plait.report.figures.figures_of` names them.
    """
    charts = {"recovered": _recovered(account, slots)}
    if account.scales:
        charts["scales"] = panels_of(_scales(account), slots)
    elif any(len(c.points) > 1 for c in account.curves):
        lines = {m: [Line(c.arm, c.points) for c in account.curves if c.merge == m] for m in account.merges}
        both = room_for([y for ls in lines.values() for one in ls for _, y in one.points])
        charts["curves"] = panels_of(
            [Panel(m, "scale", "mean score, %", ls, span=both) for m, ls in lines.items() if ls], slots
        )
    if any(r["merged"] for r in account.sweep):
        charts["sweep"] = panels_of(_sweep(account), slots)
    return charts


def _recovered(account: Account, slots: Mapping[str, int]) -> Markup:
    defined = all(math.isfinite(v) for b in account.best for v in b.recovered)
    factor, what = (100.0, "recovered of what plain adapters gain, %") if defined else (1.0, "merged, mean score, %")
    dots = []
    for b in account.best:
        each = [factor * v for v in (b.recovered if defined else b.merged)]
        interval = account.inference.intervals.get(b.arm) if defined else None
        ends = (factor * interval[0], factor * interval[1]) if interval else None
        dots.append(Dot(b.arm, " / ".join(dict.fromkeys(b.merges.values())), float(np.mean(each)), ends, each))
    marks = [Mark("floor", 0.0 if defined else float(np.mean(account.best[0].floor)), "floor")]
    for name, arm in dict.fromkeys((r.reference, r.arm) for r in account.references):
        mine = [r for r in account.references if (r.reference, r.arm) == (name, arm)]
        value = factor * float(np.mean([r.recovered if defined else r.score for r in mine]))
        if name == "served separately":
            marks.append(Mark(f"adapters of {arm} alone", value, "solid"))
        elif name in _LINES:
            marks.append(Mark(f"{name} ({arm})", value, _LINES[name]))
    return dots_of(dots, marks, what, slots)


def _scales(account: Account) -> list[Panel]:
    lines = {
        merge: [
            Line(c.arm, [p for p in c.points if 1 / _FAR < p[0] < _FAR]) for c in account.scales if c.merge == merge
        ]
        for merge in dict.fromkeys(c.merge for c in account.scales)
    }
    both = room_for([y for ls in lines.values() for one in ls for _, y in one.points])
    return [
        Panel(
            "each arm's best merge" if merge == "best" else merge,
            "scale / chosen scale", "points against the chosen scale", ls, (0.25, 0.5, 1, 2, 4), True, both,
        )
        for merge, ls in lines.items()
    ]  # fmt: skip


def _sweep(account: Account) -> list[Panel]:
    rows = [r for r in account.sweep if r["merged"]]
    axes = (("lr", "learning rate", True), ("alone", "adapters alone, %", False), ("delta_norm", "delta norm", True))
    panels = []
    for key, name, logarithmic in axes:
        lines = []
        for arm, step in sorted({(r["arm"], r["step"]) for r in rows}):
            mine = sorted((r for r in rows if (r["arm"], r["step"]) == (arm, step)), key=lambda r: float(r["lr"]))
            lines.append(Line(arm, [(float(r[key]), max(r["merged"].values())) for r in mine], dashed=bool(step)))
        values = sorted({float(r[key]) for r in rows})
        ticks = values if key == "lr" else list(np.geomspace(values[0], values[-1], 4)) if logarithmic else ()
        panels.append(Panel(name, name, "best merge, mean score, %", lines, ticks, logarithmic))
    return panels
