"""How the charts of the HTML page are drawn: SVG in the page's own colours, its letters of the same size on any screen.

The Markdown page has figures of matplotlib (`plait.report.figures`): files of one size and one theme. These follow the page.
Colours are those of its style sheet, light or dark; whatever is shown has a title for who does not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Dot", "Line", "Mark", "Panel", "colour_of", "dots_of", "panels_of", "room_for"]
Point = tuple[float, float]
_WIDTH, _HEIGHT = 340.0, 240.0  # of a panel: about the pixels it has on the page, so that letters keep their size
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 14.0, 10.0, 42.0  # what axes take of it
_RADIUS = 3.6  # of a mark at a point
# The form of an arm's marks, by its place in the palette, so that curves are told apart without their colours: corners, in radii.
_FORMS: Sequence[Sequence[Point]] = (
    (),  # a disc
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.3), (1.2, 0.85), (-1.2, 0.85)),
    ((0, -1.4), (1.1, 0), (0, 1.4), (-1.1, 0)),
    ((0, 1.3), (1.2, -0.85), (-1.2, -0.85)),
    ((-1.3, -0.4), (-0.4, -0.4), (-0.4, -1.3), (0.4, -1.3), (0.4, -0.4), (1.3, -0.4), (1.3, 0.4), (0.4, 0.4), (0.4, 1.3),
     (-0.4, 1.3), (-0.4, 0.4), (-1.3, 0.4)),
    ((-1.1, -0.5), (-0.5, -1.1), (0, -0.6), (0.5, -1.1), (1.1, -0.5), (0.6, 0), (1.1, 0.5), (0.5, 1.1), (0, 0.6), (-0.5, 1.1),
     (-1.1, 0.5), (-0.6, 0)),
    ((-0.55, -1.3), (0.55, -1.3), (0.55, 1.3), (-0.55, 1.3)),
)  # fmt: skip
_LETTER = 7.5  # width of a letter of a tick's label, at most


@dataclass(frozen=True, slots=True)
class Dot:
    """A row of a dot chart.

    Args:
        arm: Name.
        label: What else names the row.
        value: Where the dot is; NaN for none.
        interval: Ends of the line through it; None for none.
        each: Values that `value` is the mean of.
    """

    arm: str
    label: str
    value: float
    interval: Point | None = None
    each: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line through a dot chart.

    Args:
        label: Its name in the legend.
        value: Its place; one that is NaN is left out.
        style: "solid", "dashed", "dashdot" or "floor".
    """

    label: str
    value: float
    style: str


@dataclass(frozen=True, slots=True)
class Line:
    """A curve.

    Args:
        arm: Name.
        points: (x, y), by x.
        dashed: Whether it is drawn so.
    """

    arm: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves between two axes.

    Args:
        title: What is shown.
        x, y: Names of the axes.
        lines: The curves.
        ticks: Values to mark on the horizontal axis; none: chosen here.
        logarithmic: Whether the horizontal axis is.
        span: Ends of the vertical axis; those of the curves by default.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    ticks: Sequence[float] = field(default=())
    logarithmic: bool = False
    span: Point | None = None


def room_for(values: Sequence[float]) -> Point:
    """Give the ends of an axis that holds values, with a little room.

    >>> room_for([0.0, 100.0])
    (-5.0, 105.0)
    """
    known = [v for v in values if math.isfinite(v)] or [0.0]
    room = 0.05 * (max(known) - min(known)) or 1.0
    return min(known) - room, max(known) + room


def colour_of(arm: str, slots: Mapping[str, int]) -> str:
    """Name the style sheet's class of an arm's colour."""
    return f"c{slots[arm]}" if arm in slots else "rest"


def dots_of(dots: Sequence[Dot], marks: Sequence[Mark], what: str, slots: Mapping[str, int]) -> Markup:
    """Draw a dot and its interval in a row for each arm; places are shares of the width, so that nothing is scaled.

    Args:
        dots: Rows, from above.
        marks: Vertical lines, which the legend names.
        what: What the axis measures.
        slots: Arm -> place in the palette.
    """
    from markupsafe import Markup

    marks = [m for m in marks if math.isfinite(m.value)]
    low, high = room_for([v for d in dots for v in (d.value, *(d.interval or ()), *d.each)] + [m.value for m in marks])

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    line = Markup('<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="100%"/>')
    ticks = _ticks(low, high)
    grid = [line.format("grid", at(t)) for t in ticks] + [line.format(f"mark {m.style}", at(m.value)) for m in marks]
    rows = []
    for d in dots:
        shapes = list(grid)
        if d.interval:
            ends = tuple(map(at, d.interval))
            shapes.append(Markup('<line class="interval" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(*ends))
        seeds = d.each if len(d.each) > 1 else ()
        shapes += [Markup('<circle class="seed" cx="{}" cy="50%" r="2.5"/>').format(at(v)) for v in seeds]
        if math.isfinite(d.value):
            shapes.append(Markup('<circle class="dot" cx="{}" cy="50%" r="6"/>').format(at(d.value)))
        rows.append(_row(d, Markup("").join(shapes), slots))
    names = Markup("").join(Markup('<span style="left:{}">{:g}</span>').format(at(t), t) for t in ticks)
    key = Markup('<li><svg class="key" aria-hidden="true">{}</svg>{} ({:.0f})</li>')
    legend = [key.format(line.format(f"mark {m.style}", "50%"), m.label, m.value) for m in marks]
    return Markup(
        '<figure class="dots"><figcaption>{}</figcaption>{}<div class="axis" aria-hidden="true"><div>{}</div></div></figure>'
        '<ul class="legend">{}</ul>'
    ).format(what, Markup("").join(rows), names, Markup("").join(legend))


def _row(dot: Dot, shapes: Markup, slots: Mapping[str, int]) -> Markup:
    from markupsafe import Markup

    text = f"{dot.value:z.0f}" if math.isfinite(dot.value) else "–"
    sure = f"{dot.interval[0]:z.0f} to {dot.interval[1]:z.0f}" if dot.interval else ""
    title = f"{dot.arm}, {dot.label}: {text}" + (f", 95 % interval {sure}" if sure else "")
    return Markup(
        '<div class="row"><div class="name"><code>{}</code> <small>{}</small></div><div class="plot"><svg class="strip {}" role="img"'
        ' aria-label="{}"><title>{}</title>{}</svg></div><div class="value"><b>{}</b> <small>{}</small></div></div>'
    ).format(dot.arm, dot.label, colour_of(dot.arm, slots), title, title, shapes, text, sure)


def panels_of(panels: Sequence[Panel], slots: Mapping[str, int]) -> Markup:
    """Draw curves, a panel beside the other where there is room, with one legend.

    Args:
        panels: What is drawn.
        slots: Arm -> place in the palette; arms without one are grey and lie below.
    """
    from markupsafe import Markup

    arms = sorted({ln.arm for p in panels for ln in p.lines}, key=lambda a: (slots.get(a, len(slots)), a))
    key = Markup('<li class="line {}"><svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{}</svg>{}</li>')
    keys = [key.format(colour_of(a, slots), _mark(slots[a], (0.0, 0.0)), a) for a in arms if a in slots]
    keys += [key.format("rest", Markup('<polyline points="-6,0 6,0"/>'), "other arms")] if len(keys) < len(arms) else []
    figure = Markup("<figure><figcaption>{}</figcaption>{}</figure>")
    drawn = [figure.format(p.title, _panel(p, slots)) for p in panels]
    return Markup('<ul class="legend">{}</ul><div class="panels">{}</div>').format(
        Markup("").join(keys), Markup("").join(drawn)
    )


def _panel(panel: Panel, slots: Mapping[str, int]) -> Markup:
    """One panel as SVG: grid, curves with the grey ones first, and a title that reads them out."""
    from markupsafe import Markup

    place = math.log if panel.logarithmic else float
    left, right = room_for([place(x) for ln in panel.lines for x, _ in ln.points])
    low, high = panel.span or room_for([y for ln in panel.lines for _, y in ln.points])

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place(x) - left) / (right - left)

    def down(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    shapes = []
    for y in _ticks(low, high):
        text = Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" class="y">{:g}</text>'
        )
        shapes.append(text.format(_LEFT, _WIDTH - _RIGHT, down(y), down(y), _LEFT - 6, down(y) + 4, y))
    wanted = panel.ticks or _ticks(left, right)
    for x, name in _apart([t for t in wanted if left <= place(t) <= right], across):
        text = Markup(
            '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/><text x="{0:.1f}" y="{3}" class="x">{4}</text>'
        )
        shapes.append(text.format(across(x), _TOP, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM + 15, name))
    for ln in sorted(panel.lines, key=lambda ln: ln.arm in slots):
        spots = [(across(x), down(y)) for x, y in ln.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        marks = Markup("").join(_mark(slots[ln.arm], s) for s in spots) if ln.arm in slots else ""
        shapes.append(
            Markup('<g class="line {}{}"><title>{}</title><polyline points="{}"/>{}</g>').format(
                colour_of(ln.arm, slots), " dashed" * ln.dashed, _read_out(ln), path, marks
            )
        )
    title = f"{panel.title}: {panel.y} over {panel.x}. " + "; ".join(map(_read_out, panel.lines))
    names = Markup(
        '<text x="{:.1f}" y="{}" class="x">{}</text><text transform="translate(11 {:.1f}) rotate(-90)" class="x">{}</text>'
    ).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, panel.x, (_TOP + _HEIGHT - _BOTTOM) / 2, panel.y)
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"><title>{}</title>{}{}</svg>').format(
        _WIDTH, _HEIGHT, title, title, Markup("").join(shapes), names
    )


def _mark(slot: int, spot: Point) -> Markup:
    """The mark of an arm's place in the palette, at a point."""
    from markupsafe import Markup

    x, y = spot
    if not (form := _FORMS[slot % len(_FORMS)]):
        return Markup('<circle class="point" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, _RADIUS)
    corners = " ".join(f"{x + _RADIUS * across:.1f},{y + _RADIUS * down:.1f}" for across, down in form)
    return Markup('<polygon class="point" points="{}"/>').format(corners)


def _read_out(line: Line) -> str:
    """A curve in words: its highest point, and where it begins and ends."""
    if not line.points:
        return f"{line.arm}: nothing"
    best = max(line.points, key=lambda p: p[1])
    (x0, y0), (x1, y1) = line.points[0], line.points[-1]
    return f"{line.arm}: {y0:.1f} at {x0:.3g}, best {best[1]:.1f} at {best[0]:.3g}, {y1:.1f} at {x1:.3g}"


def _apart(ticks: Sequence[float], across: Callable[[float], float]) -> list[tuple[float, str]]:
    """The ticks whose names do not touch, from the left, with those names."""
    named: list[tuple[float, str]] = []
    end = -math.inf
    for tick in sorted(ticks):
        name = f"{tick:.0f}" if abs(tick) >= 100 else f"{tick:.3g}"
        half = _LETTER * (len(name) + 1) / 2
        if across(tick) - half >= end:
            named.append((tick, name))
            end = across(tick) + half
    return named


def _ticks(low: float, high: float) -> list[float]:
    """About five round values between two."""
    from matplotlib.ticker import MaxNLocator

    return [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
