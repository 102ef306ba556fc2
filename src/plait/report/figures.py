"""The figures of a study's page, as SVG text, drawn from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plait.report.plots import COLOURS, as_svg, blank, styled
from plait.runs.sections import PLAIN_ARMS

_REST = "#c8c8c8"  # arms without a colour of their own
_LINES = {"joint training": "--", "best single adapter": "-."}
_FAR = 4.1  # multiples of the chosen scale beyond this say nothing of a slip
_WIDE = 1.3  # inches of a legend beside the panels


def figures_of(found: Mapping[str, Any], main: str) -> dict[str, str]:
    """Name -> SVG.

    Args:
        found: The JSON of a study.
        main: The arm the others are compared with; it has the first colour.

    Returns:
        `recovered`, arms under their best merges with intervals (merged scores where recovered is not defined);
        `scales`, points lost around the chosen scale; `sweep`, merged scores against learning rate, single score and delta
        norm. One colour an arm in all three: the main arm's, the plain ones', then the best ones'; the rest are grey.
    """
    colours = _colours(found, main)
    return {
        "recovered": recovered(found, colours),
        "scales": scales(found["scales"], colours),
        "sweep": sweep(found["sweep"], colours),
    }


def _colours(found: Mapping[str, Any], main: str) -> dict[str, str]:
    ranked = [b["arm"] for b in found["best"]]
    first = list(dict.fromkeys([main, *(a for a in ranked if a in PLAIN_ARMS), *ranked]))
    return dict(zip(first, COLOURS, strict=False))


@styled
def recovered(found: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Each arm under its best merge: mean (dot), seeds (small), 95 % interval (line); references as vertical lines."""
    best = list(reversed(found["best"]))
    defined = not any(None in b["recovered"] for b in best)
    key, factor = ("recovered", 100.0) if defined else ("merged", 1.0)
    figure, (axis,) = blank(7.0, 1.1 + 0.24 * len(best))
    for y, b in enumerate(best):
        colour = colours.get(b["arm"], "#707070")
        values = factor * np.array(b[key])
        if defined and b["interval"]:
            axis.hlines(y, *(factor * v for v in b["interval"]), colors=colour, linewidth=1.4)
        axis.plot(values, [y] * len(values), "o", markersize=2.5, color=colour, alpha=0.6)
        axis.plot(values.mean(), y, "o", markersize=6, color=colour)
    for x, label, style in _marks(found, key, factor):
        axis.axvline(x, color="black", linestyle=style, linewidth=0.8, label=label)
    axis.set_yticks(range(len(best)), [b["arm"] for b in best])
    axis.set_ylim(-0.6, len(best) - 0.4)
    axis.set_xlabel("recovered, %" if defined else "merged, mean score, %")
    axis.grid(axis="x", linewidth=0.3)
    axis.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return as_svg(figure)


def _marks(found: Mapping[str, Any], key: str, factor: float) -> list[tuple[float, str, str]]:
    """Where the references stand, mean over seeds: the floor, adapters served apart, joint training, the best single one."""
    source = "score" if key == "merged" else "recovered"
    marks = [(float(np.mean(found["best"][0]["floor"])) if key == "merged" else 0.0, "floor", ":")]
    for name, arm in dict.fromkeys((r["reference"], r["arm"]) for r in found["references"]):
        values = [r[source] for r in found["references"] if (r["reference"], r["arm"]) == (name, arm)]
        if None in values:
            continue
        if name == "served separately":
            marks.append((factor * float(np.mean(values)), "plain adapters alone", "-"))
        elif name in _LINES:
            marks.append((factor * float(np.mean(values)), f"{name} ({arm})", _LINES[name]))
    return marks


@styled
def scales(curves: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Points won or lost by a multiple of the chosen scale, one panel a merge, one curve an arm."""
    merges = list(dict.fromkeys(c["merge"] for c in curves))
    figure, axes = blank(2.9 * len(merges) + _WIDE, 3.0, len(merges))
    for axis, merge in zip(axes, merges, strict=True):
        for c in _grey_first([c for c in curves if c["merge"] == merge], colours):
            near = [p for p in c["points"] if 1 / _FAR < p[0] < _FAR]
            axis.plot(*zip(*near, strict=True), **_line(c["arm"], colours))
        axis.set_xscale("log")
        _ticks(axis, (0.25, 0.5, 1, 2, 4))
        axis.set_title("each arm's best merge" if merge == "best" else merge)
        axis.set_xlabel("scale / chosen scale")
        axis.grid(linewidth=0.3)
    low, high = min(a.get_ylim()[0] for a in axes), max(a.get_ylim()[1] for a in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    axes[0].set_ylabel("points against the chosen scale")
    _legend(figure, axes)
    return as_svg(figure)


@styled
def sweep(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """The best merge's score against learning rate, score alone and delta norm; dotted: before the end."""
    merged = [r for r in rows if r["merged"]]
    panels = (("lr", "learning rate", True), ("alone", "adapters alone, %", False), ("delta_norm", "delta norm", True))
    figure, axes = blank(3.1 * len(panels) + _WIDE, 3.2, len(panels))
    arms = dict.fromkeys(r["arm"] for r in merged)
    for axis, (key, label, logarithmic) in zip(axes, panels, strict=True):
        for one in _grey_first([{"arm": a} for a in arms], colours):
            mine = sorted((r for r in merged if r["arm"] == one["arm"]), key=lambda r: (r["step"], r["lr"]))
            for step in dict.fromkeys(r["step"] for r in mine):
                points = [(r[key], max(r["merged"].values())) for r in mine if r["step"] == step]
                style = _line(one["arm"], colours) | ({"linestyle": ":"} if step else {})
                axis.plot(*zip(*points, strict=True), **style)
        if logarithmic:
            values = sorted({r[key] for r in merged})
            axis.set_xscale("log")
            _ticks(axis, values if key == "lr" else list(np.geomspace(values[0], values[-1], 4)))
        axis.set_xlabel(label)
        axis.grid(linewidth=0.3)
    axes[0].set_ylabel("merged, mean score, % (tuning rows)")
    _legend(figure, axes)
    return as_svg(figure)


def _grey_first(lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Drawn in this order, those with a colour come to lie above the others."""
    return sorted(lines, key=lambda c: -list(colours).index(c["arm"]) if c["arm"] in colours else -len(colours))


def _line(arm: str, colours: Mapping[str, str]) -> dict[str, Any]:
    if arm not in colours:
        return {"color": _REST, "linewidth": 0.9, "label": "other arms"}
    return {"color": colours[arm], "linewidth": 1.3, "marker": "o", "markersize": 2.5, "label": arm}


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis in plain figures, where its own would be formulas."""
    axis.set_xticks(values, [f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in values])
    axis.minorticks_off()


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, each arm once, those with a colour first (they are drawn last)."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    last_first = list(handles)[::-1]
    order = sorted(last_first, key=lambda name: name == "other arms")
    figure.legend([handles[n] for n in order], order, fontsize=7, loc="outside right upper", frameon=False)
