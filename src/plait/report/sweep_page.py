"""The sweep's sections of a study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.report.markdown import markdown_table

_MATCHED = (
    "Merged scores of the sweep, an arm minus `{0}`, where the two are alike: at the same delta norm, or at the same score"
    " alone. `{0}` at its rates draws a curve of merged scores over log norm, or over the score alone, straight between two"
    " rates, for each moment; points of another arm are held against the curve of their moment where they lie in its range"
    " (where these lie, and how many of how many, stands first), and the mean difference is shown, in points. A score alone"
    " rises with the rate and falls behind its best: of every arm, in both comparisons, only rates up to its best alone count,"
    " and none that reaches no more than a lower one. Arms that take another's rate were not swept. This describes tuning rows"
    " of one seed, at rates that lie far apart; it tests nothing."
)
_KINDS = {"norm": "at the same delta norm", "alone": "at the same score alone"}


def sweep_sections(sweep: Sequence[Mapping[str, Any]], matched: Sequence[Mapping[str, Any]], figure: str) -> list[str]:
    """Paragraphs: what every arm did at every rate and moment, and arms where they are alike.

    Args:
        sweep: The list of this name in the JSON of a study.
        matched: Likewise.
        figure: The sweep's, as an image link.
    """
    found = [
        "## The sweep",
        "On the tuning rows, at the tuning seed; merged is the best of the merges. Dotted: a moment before the end.",
        figure,
        _swept_table(sweep),
    ]
    if matched:
        title = "## At the same norm, at the same score alone"
        found += [title, _MATCHED.format(matched[0]["against"]), matched_table(matched)]
    return found


def _swept_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for r in found:
        if "diverged" in r:
            lines.append([f"`{r['arm']}`", f"{r['lr']:g}", str(r["step"] or "end"), "diverged", *"–––"])
            continue
        best = max(r["merged"], key=lambda m: r["merged"][m]) if r["merged"] else None
        merged = [f"{r['merged'][best]:.1f}", best] if best else ["–", "–"]
        lines.append(
            [
                f"`{r['arm']}`",
                f"{r['lr']:g}",
                str(r["step"] or "end"),
                f"{r['alone']:.1f}",
                f"{r['delta_norm']:.2f}",
                *merged,
            ]
        )
    note = "\n\n*diverged*: a loss became NaN or infinite; such a rate is never chosen."
    table = markdown_table(["arm", "lr", "step", "alone", "delta norm", "merged", "by"], lines)
    return table + (note if any("diverged" in r for r in found) else "")


def matched_table(found: Sequence[Mapping[str, Any]]) -> str:
    """An arm a line: where it has equals in the reference, and the differences there by merge."""
    merges, kinds = (list(dict.fromkeys(r[key] for r in found)) for key in ("merge", "matched"))
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in found):
        cells = [f"`{arm}`"]
        for kind in kinds:
            mine = {r["merge"]: r for r in found if (r["arm"], r["matched"]) == (arm, kind)}
            at, of = (mine[merges[0]][key] for key in ("at", "of"))
            ends = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (at[:1] + at[-1:])))
            cells.append(f"{ends} ({len(at)} of {of})" if at else "no overlap")
            cells += [f"{mine[m]['difference']:+.1f}" if at else "–" for m in merges]
        lines.append(cells)
    header = [h for kind in kinds for h in (_KINDS[kind], *merges)]
    return markdown_table(["arm", *header], lines)
