"""The plots of a report, as SVG text."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from plait.report.summary import Line

P = ParamSpec("P")

# Okabe & Ito's palette: told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b0a000")


# The same numbers give the same bytes; names are never read as formulas.
_STYLE: Any = {"font.size": 9, "text.parse_math": False, "svg.hashsalt": "plait", "svg.fonttype": "none"}


def styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with the style of the report, whatever the process has set."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*arguments, **options)

    return drawn


def blank(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def as_svg(figure: Any) -> str:
    """A figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


@styled
def bars(lines: Sequence[Line]) -> str:
    """Merged score of every arm and merge, with what the arm's adapters reach alone (tick) and the floor (line)."""
    arms, merges = list(dict.fromkeys(x.arm for x in lines)), list(dict.fromkeys(x.merge for x in lines))
    figure, (axis,) = blank(max(5.0, 0.5 + 0.35 * len(arms) * (len(merges) + 1)), 3.2)
    width = 0.8 / len(merges)
    for line in lines:
        k = merges.index(line.merge)
        x = arms.index(line.arm) + (k - (len(merges) - 1) / 2) * width
        label = line.merge if line.arm == arms[0] else None
        axis.bar(
            x, line.merged.value, 0.92 * width, yerr=line.merged.error, color=COLOURS[k % 8], label=label, capsize=2
        )
    for i, arm in enumerate(arms):
        alone = next(x.alone.value for x in lines if x.arm == arm)
        axis.hlines(alone, i - 0.45, i + 0.45, colors="black", label="each alone" if i == 0 else None)
    axis.axhline(lines[0].floor.value, color="grey", linestyle=":", label="floor")
    axis.set_xticks(range(len(arms)), arms)
    low = min([lines[0].floor.value, *(x.merged.value for x in lines)])
    axis.set_ylim(bottom=max(0.0, low - 8))
    axis.set_ylabel("mean score, %")
    axis.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


@styled
def curves(found: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """Selection score against the scale of the merge, one panel a merge, one curve an arm."""
    merges = list(dict.fromkeys(m for by_merge in found.values() for m in by_merge))
    figure, axes = blank(3.4 * len(merges), 3.0, len(merges))
    for axis, merge in zip(axes, merges, strict=True):
        for k, (arm, by_merge) in enumerate(found.items()):
            if merge in by_merge:
                x, y = zip(*by_merge[merge], strict=True)
                axis.plot(x, y, marker="o", markersize=3.5, color=COLOURS[k % 8], label=arm)
        axis.set_title(merge)
        axis.set_xlabel("scale")
    axes[0].set_ylabel("mean score, % (selection half)")
    axes[0].legend(fontsize=8)
    return as_svg(figure)


@styled
def heat_maps(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Predicted relative output shift: row, whose adapter; column, whose inputs; one panel an arm, one logarithmic colour scale."""
    import numpy as np
    from matplotlib.colors import LogNorm

    arms = list(tables)
    tasks = list(next(iter(tables.values())))
    names = [_short(t) for t in tasks]
    labels = 0.1 * max(map(len, names))  # inches that tick labels take
    side = max(2.6, 0.42 * len(tasks) + 1.2 + labels)
    figure, axes = blank(side * len(arms) + 1.2, side, len(arms))
    grids = {arm: np.array([[tables[arm][i][j] for j in tasks] for i in tasks]) for arm in arms}
    found = np.concatenate([g[np.isfinite(g) & (g > 0)] for g in grids.values()])
    low, top = (max(float(found.min()), float(found.max()) / 1e4), float(found.max())) if found.size else (0.1, 1.0)
    norm = LogNorm(low, max(top, 1.01 * low), clip=True)
    image = None
    for axis, arm in zip(axes, arms, strict=True):
        image = axis.imshow(grids[arm], cmap="viridis", norm=norm)
        axis.set_title(_short(arm))
        axis.set_xticks(range(len(tasks)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(tasks)), names)
        axis.set_xlabel("inputs of")
    axes[0].set_ylabel("adapter of")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.7)
    ticks = np.geomspace(low, max(top, 1.01 * low), 4)
    bar.set_ticks(ticks, labels=[f"{t:.2g}" for t in ticks])  # plain text: formulas are off, names may hold a dollar
    bar.minorticks_off()
    return as_svg(figure)
