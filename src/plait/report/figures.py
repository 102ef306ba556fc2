"""The figures of a page, as SVG text, drawn from the JSON of its account alone."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np

from plait.report.colours import PALETTE, REST, ranked_arms, slots_of

__all__ = ["figures_of"]
P = ParamSpec("P")
# The same numbers give the same bytes; names are never read as formulas.
_STYLE: Any = {"font.size": 9, "text.parse_math": False, "svg.hashsalt": "plait", "svg.fonttype": "none"}
_LINES = {"joint training": "--", "best single adapter": "-."}
_FAR = 4.1  # multiples of the chosen scale beyond this say nothing of a slip
_WIDE = 1.3  # inches of a legend beside the panels


def styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with the style of the report, whatever the process has set."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*arguments, **options)

    return drawn


def blank(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).reshape(-1)


def as_svg(figure: Any, title: str) -> str:
    """A figure as an SVG element, with a title for who does not see it."""
    from xml.sax.saxutils import escape

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    start, end = svg.index("<svg"), svg.index(">", svg.index("<svg"))
    return f'{svg[start:end]} role="img"><title>{escape(title)}</title>{svg[end + 1 :]}'


def figures_of(tables: Mapping[str, Any], main: str) -> dict[str, str]:
    """Draw what there is to draw.

    Args:
        tables: The JSON of a study, or of a report, which may hold `curves` too.
        main: The arm the others are compared with; it has the first colour.

    Returns:
        Name -> SVG: `recovered`, arms under their best merges with intervals (merged scores where recovered is not defined);
        `scales`, points lost around the chosen scale, or `curves`, scores over the scales where these are no ladder; `sweep`,
        merged scores against learning rate, single score and delta norm. One colour an arm in all of them and on every page
        (`plait.report.colours`); the rest are grey.
    """
    colours = _colours(tables, main)
    figures = {"recovered": recovered(tables, colours)}
    if tables["scales"]:
        figures["scales"] = scales(tables["scales"], colours)
    elif any(len(c["points"]) > 1 for c in tables.get("curves", ())):
        figures["curves"] = curves(tables["curves"], colours)
    if tables["sweep"]:
        figures["sweep"] = sweep(tables["sweep"], colours)
    return figures


def _colours(tables: Mapping[str, Any], main: str) -> dict[str, str]:
    slots = slots_of(ranked_arms(main, [b["arm"] for b in tables["best"]]))
    return {arm: PALETTE[slot] for arm, slot in slots.items()}


@styled
def recovered(tables: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Each arm under its best merge: mean (dot), seeds (small), 95 % interval (line); references as vertical lines."""
    best = list(reversed(tables["best"]))
    defined = not any(None in b["recovered"] for b in best)
    key, factor = ("recovered", 100.0) if defined else ("merged", 1.0)
    figure, (axis,) = blank(7.0, 1.2 + 0.24 * len(best))
    for y, b in enumerate(best):
        colour = colours.get(b["arm"], "#707070")
        values = factor * np.array(b[key])
        if defined and b["interval"]:
            axis.hlines(y, *(factor * v for v in b["interval"]), colors=colour, linewidth=1.4)
        axis.plot(values, [y] * len(values), "o", markersize=2.5, color=colour, alpha=0.6)
        axis.plot(values.mean(), y, "o", markersize=6, color=colour)
    for x, label, style in _marks(tables, key, factor):
        axis.axvline(x, color="black", linestyle=style, linewidth=0.8, label=label)
    axis.set_yticks(range(len(best)), [b["arm"] for b in best])
    axis.set_ylim(-0.6, len(best) - 0.4)
    axis.set_xlabel("recovered, %" if defined else "merged, mean score, %")
    axis.grid(axis="x", linewidth=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.plot([], [], "o", markersize=6, color=REST, label="mean over seeds")
    axis.plot([], [], "o", markersize=2.5, color=REST, label="a seed")
    if key == "recovered":
        axis.plot([], [], color=REST, linewidth=1.4, label="95 % interval")
    axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    means = ", ".join(f"{b['arm']} {factor * float(np.mean(b[key])):.0f}" for b in tables["best"])
    return as_svg(figure, f"{key} of each arm under its best merge, percent: {means}")


def _marks(tables: Mapping[str, Any], key: str, factor: float) -> list[tuple[float, str, str]]:
    """Where the references stand, mean over seeds: the floor, adapters served apart, joint training, the best single one."""
    source = "score" if key == "merged" else "recovered"
    marks = [(float(np.mean(tables["best"][0]["floor"])) if key == "merged" else 0.0, "floor", ":")]
    for name, arm in dict.fromkeys((r["reference"], r["arm"]) for r in tables["references"]):
        values = [r[source] for r in tables["references"] if (r["reference"], r["arm"]) == (name, arm)]
        if None in values:
            continue
        if name == "served separately":
            marks.append((factor * float(np.mean(values)), "plain adapters alone", "-"))
        elif name in _LINES:
            marks.append((factor * float(np.mean(values)), f"{name} ({arm})", _LINES[name]))
    return marks


@styled
def scales(lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Points won or lost by a multiple of the chosen scale, one panel a merge, one curve an arm."""
    figure, axes = _panels(lines, colours, lambda multiple: 1 / _FAR < multiple < _FAR)
    for axis in axes:
        axis.set_xscale("log")
        _ticks(axis, (0.25, 0.5, 1, 2, 4))
        axis.set_xlabel("scale / chosen scale")
    low, high = min(a.get_ylim()[0] for a in axes), max(a.get_ylim()[1] for a in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    axes[0].set_ylabel("points against the chosen scale")
    _legend(figure, axes)
    return as_svg(figure, "points won or lost by another scale than the chosen one")


@styled
def curves(lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Scores over the scales that were tried, one panel a merge, one curve an arm."""
    figure, axes = _panels(lines, colours, lambda _: True)
    for axis in axes:
        axis.set_xlabel("scale")
    axes[0].set_ylabel("mean score, %")
    _legend(figure, axes)
    return as_svg(figure, "mean score over the scale of the merge")


def _panels(
    lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str], near: Callable[[float], bool]
) -> tuple[Any, Sequence[Any]]:
    """One panel a merge with one curve an arm, of the points that are near."""
    merges = list(dict.fromkeys(c["merge"] for c in lines))
    figure, axes = blank(2.9 * len(merges) + _WIDE, 3.0, len(merges))
    for axis, merge in zip(axes, merges, strict=True):
        for c in _grey_first([c for c in lines if c["merge"] == merge], colours):
            points = [p for p in c["points"] if near(p[0])]
            if points:
                axis.plot(*zip(*points, strict=True), **_line(c["arm"], colours))
        axis.set_title("each arm's best merge" if merge == "best" else merge)
        axis.grid(linewidth=0.3)
    return figure, axes


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
    return as_svg(figure, "the sweep: merged score over learning rate, score alone and delta norm")


def _grey_first(lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Drawn in this order, those with a colour come to lie above the others."""
    return sorted(lines, key=lambda c: -list(colours).index(c["arm"]) if c["arm"] in colours else -len(colours))


def _line(arm: str, colours: Mapping[str, str]) -> dict[str, str | float]:
    if arm not in colours:
        return {"color": REST, "linewidth": 0.9, "label": "other arms"}
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
