"""What a page says about the sweep by which learning rates were chosen."""

from __future__ import annotations

from collections.abc import Sequence

from plait.report.matched import Matched, Swept
from plait.report.words import NONE, Section, Table, signed

__all__ = ["matched_section", "sweep_section"]
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


def sweep_section(sweep: Sequence[Swept]) -> Section:
    """Tell what every arm did at every rate and moment.

    Args:
        sweep: Rows of `plait.runs.waves.swept`.
    """
    text = "On the tuning rows, at the tuning seed; merged is the best of the merges. Dotted: a moment before the end."
    return Section("The sweep", text, (_swept_table(sweep),), "sweep")


def _swept_table(sweep: Sequence[Swept]) -> Table:
    lines = []
    for r in sweep:
        place = (f"`{r['arm']}`", f"{r['lr']:g}", str(r["step"] or "end"))
        if "diverged" in r:
            lines.append((*place, "diverged", NONE, NONE, NONE))
            continue
        best = max(r["merged"], key=lambda m: r["merged"][m]) if r["merged"] else None
        merged = (f"{r['merged'][best]:z.1f}", best) if best else (NONE, NONE)
        lines.append((*place, f"{r['alone']:z.1f}", f"{r['delta_norm']:z.2f}", *merged))
    note = "*diverged*: a loss became NaN or infinite; such a rate is never chosen."
    header = ("arm", "lr", "step", "alone", "delta norm", "merged", "by")
    return Table(header, lines, note if any("diverged" in r for r in sweep) else "")


def matched_section(matched: Sequence[Matched]) -> Section:
    """Compare arms where they are alike: an arm a line, with the differences there by merge."""
    text = _MATCHED.format(matched[0].against) if matched else ""
    return Section("At the same norm, at the same score alone", text, (_matched_table(matched),))


def _matched_table(matched: Sequence[Matched]) -> Table:
    merges, kinds = (list(dict.fromkeys(getattr(r, key) for r in matched)) for key in ("merge", "matched"))
    lines = []
    for arm in dict.fromkeys(r.arm for r in matched):
        cells = [f"`{arm}`"]
        for kind in kinds:
            mine = {r.merge: r for r in matched if (r.arm, r.matched) == (arm, kind)}
            at, of = mine[merges[0]].at, mine[merges[0]].of
            ends = " to ".join(dict.fromkeys(f"{x:z.1f}" for x in (at[:1] + at[-1:])))
            cells.append(f"{ends} ({len(at)} of {of})" if at else "no overlap")
            cells += [NONE if (d := mine[m].difference) is None else signed(d) for m in merges]
        lines.append(tuple(cells))
    return Table(("arm", *(h for kind in kinds for h in (_KINDS[kind], *merges))), lines)
