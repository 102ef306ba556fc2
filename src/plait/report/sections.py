"""What a page says about a run, section by section: texts, tables and figures, before they are HTML or Markdown.

Texts and cells are in the small part of Markdown that both pages know: `code`, **strong** and *emphasis*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from plait.disk.store import versions
from plait.progress import duration
from plait.recipes.sections import PLAIN_ARMS
from plait.report.account import Account
from plait.report.grid import grid_table, heat_tables, merge_table
from plait.report.inference import MARGIN, Comparison
from plait.report.remarks import ONE_BY_ONE
from plait.report.sweep_sections import matched_section, sweep_section
from plait.report.table import mean
from plait.report.words import NONE, Cell, Section, Table, between, percent, points

__all__ = ["about_lines", "sections_of"]


def about_lines(account: Account) -> list[str]:
    """List what is known of where it was run, and the versions of the packages that made the page."""
    packages, recipe = versions(), account.recipe
    lines = [
        f"{k}: {f'`{v}`' if k == 'command' else _timed(k, v)}" for k, v in account.about.items() if k not in packages
    ]
    software = ", ".join(f"{k} {v}" for k, v in account.about.items() if k in packages)
    tuning = f"; tuning seed: {recipe.tuning_seed}" if account.sweep else ""
    return [
        f"seeds: {', '.join(map(str, recipe.seeds))}{tuning}",
        *lines,
        *([f"page made with: {software}"] if software else []),
    ]


def _timed(key: str, text: str) -> str:
    """Add to a number of seconds how people say it."""
    number, _, rest = text.partition(" ")
    seconds = number.rstrip(",")
    long = key == "seconds" and seconds.isdecimal() and int(seconds) >= 100
    return f"{seconds} ({duration(int(seconds))}){number[len(seconds) :]} {rest}".strip() if long else text


def sections_of(account: Account) -> list[Section]:
    """Put a run's account into sections; those without content are left out."""
    sections = [
        _best(account),
        Section("Every task under every arm and merge", "", (merge_table(account), grid_table(account))),
        _scales(account),
        Section("References", _REFERENCES, (_references(account),)),
        Section("Comparisons", _comparisons_text(account), (_comparisons(account.inference.comparisons),)),
        sweep_section(account.sweep),
        matched_section(account.matched),
        Section(
            "Ablations",
            "One setting changed at a time; recovered against the study's own reference.",
            (_ablations(account),),
        ),
        Section("What tells beforehand", _PREDICTORS, (_predictors(account),)),
        Section(
            "What the statistics predict", _SHIFTS if account.interference else "", heat_tables(account.interference)
        ),
        Section(ONE_BY_ONE, "", notes=[text for r in account.remarks if len(r.each) > 1 for text in r.each]),
        Section("What the words mean", "", terms=_terms(account)),
    ]
    return [s for s in sections if any(t.rows for t in s.tables) or s.terms or s.notes or (s.text and not s.tables)]


_SCALES = (
    "Points won or lost by a multiple of the chosen scale, which was chosen on the other half: mean over tasks, halves and"
    " seeds, on the grid rows of the reported half. Colours are the same in all figures; grey: the other arms."
)
_CURVES = (
    "Mean score over tasks, halves and seeds against the scale that multiplies the merged update, on the rows that scales are"
    " chosen from. A flat top forgives a wrong guess."
)
_REFERENCES = "What a merge is measured against; mean score over tasks, percent."
_PREDICTORS = (
    "Points a task loses by merging against what is known of the adapters: rank correlation with differences between tasks"
    " taken out, and the variance explained on tasks and on arms left out of the fit."
)
_SHIFTS = (
    "Relative output shift that each adapter (row) causes on each task's inputs (column), mean over modules, computed from the"
    " statistics files alone, first seed. The diagonal is what an adapter does for its own task; everything else is"
    " interference. Good is a dark diagonal in a pale map: every adapter moves its own task and leaves the others alone. One"
    " logarithmic scale of colours for all maps."
)


def _terms(account: Account) -> list[tuple[str, str]]:
    """Explain the words of the tables."""
    reference = account.reference
    alone = "those of the best plain arm at its own rate" if reference in PLAIN_ARMS else f"those of `{reference}`"
    floor = mean(r.floor for r in account.plain_rows)
    terms = [
        ("arm", "a way of starting A and of training the adapters."),
        ("floor", f"the base with the task heads and no adapter: {floor:z.1f} in the mean over tasks."),
        ("alone, single", "the arm's own adapters, each on its task."),
        ("merged", "one adapter for all tasks, made of the arm's adapters."),
        ("recovered", f"(merged - floor) / (alone - floor), the adapters alone being {alone}, the same for all arms."),
        ("of own", "recovered with the arm's own adapters as alone, which flatters an arm that is poor alone."),
        ("regret", "points that half and twice the chosen scale lose."),
        (
            "±",
            "in the first table the standard deviation over seeds, in others one standard error over seeds and examples.",
        ),
        (
            "half",
            "merges and scales are chosen on one half of the validation rows and reported on the other; halves are swapped and"
            " averaged.",
        ),
    ]
    if account.resamples > 1:
        resampled = f"{account.resamples} resamples of seeds, tasks and examples; of a single task's score, of seeds and examples."
        terms.append(("95 % interval", resampled))
    return terms


def _best(account: Account) -> Section:
    lines: list[Sequence[str | Cell]] = []
    for b in account.best:
        interval = account.inference.intervals.get(b.arm)
        share = b.mean_recovered
        spread = f" ± {percent(float(np.std(b.recovered, ddof=1)))}" if len(b.seeds) > 1 else ""
        lines.append(
            (
                f"`{b.arm}`",
                " / ".join(dict.fromkeys(b.merges.values())),
                f"{b.lr:g}" + (f", step {b.step}" if b.step else ""),
                f"{b.individual:z.1f}",
                f"{mean(b.merged):z.1f}",
                Cell(f"{percent(share)}{spread}", key=share) if math.isfinite(share) else NONE,
                f"{percent(interval[0])} to {percent(interval[1])}" if interval else NONE,
                percent(mean(b.recovered_of_own)),
                Cell(f"{b.worst} {b.worst_task:+z.0f}", key=b.worst_task),
                " / ".join(points(r) for r in (b.regret_half, b.regret_double)),
                "*" if b.edge else "",
                str(len(b.seeds)),
            )
        )
    header = ["arm", "best merge", "lr", "single", "merged", "recovered, %", "95 % interval", "of own, %", "worst task"]
    caption = (
        "Arms under the merge that the other half of the rows finds best. `*`: a scale on the edge of what was tried."
    )
    table = Table(
        (*header, "regret ½ / 2×", "edge", "seeds"), lines, caption=caption, kind="wide", strong=frozenset({0})
    )
    return Section("Each arm under its best merge", "", (table,), "recovered")


def _scales(account: Account) -> Section:
    if account.scales:
        return Section("Another scale than the chosen one", _SCALES, figure="scales")
    several = any(len(c.points) > 1 for c in account.curves)
    return Section("How much the scale matters", _CURVES if several else "", figure="curves")


def _references(account: Account) -> Table:
    lines = []
    for name, arm in dict.fromkeys((r.reference, r.arm) for r in account.references):
        mine = [r for r in account.references if (r.reference, r.arm) == (name, arm)]
        share = percent(mean(r.recovered for r in mine))
        lines.append((name, f"`{arm}`", f"{mean(r.score for r in mine):z.1f}", share, str(len(mine))))
    return Table(("reference", "arm", "score", "recovered, %", "seeds"), lines)


def _comparisons_text(account: Account) -> str:
    text = (
        f"Differences of recovered, in points; {account.resamples} resamples of seeds, tasks and examples, paired; p"
        f" Holm-corrected within a merge; *equivalent*: within ± {100 * MARGIN:z.0f} points by two one-sided tests at 5 %;"
        " *detectable*: found with power 0.8. *Here*: the tasks are not resampled, which says what holds of these very tasks"
        " and no others."
    )
    reasons = dict.fromkeys(f"{c.merge}: {c.undefined}." for c in account.inference.comparisons if c.undefined)
    return "\n\n".join([text, *reasons])


def _comparisons(compared: Sequence[Comparison]) -> Table:
    header = ("merge", "arms", "difference", "95 % interval", "p (Holm)", "equivalent", "detectable", "here")
    lines = [
        (
            c.merge, f"`{c.arm}` - `{c.other}`", percent(c.difference, "+z.1f"), between(c.low, c.high), _p(c.p_holm),
            {True: "yes", False: "no", None: NONE}[c.equivalent], percent(c.detectable, "z.1f"),
            between(c.low_here, c.high_here), _p(c.p_here),
        )
        for c in compared
    ]  # fmt: skip
    return Table((*header, "p here (Holm)"), lines)


def _p(value: float | None) -> str:
    return NONE if value is None else f"{value:z.3f}"


def _ablations(account: Account) -> Table:
    lines = [
        (r.variant, f"`{r.arm}`", r.method, f"{r.individual:z.1f}", f"{r.merged:z.1f}", percent(r.recovered))
        for r in account.rows
        if r.variant
    ]
    return Table(("changed", "arm", "merge", "single", "merged", "recovered, %"), lines)


def _predictors(account: Account) -> Table:
    def shown(value: float | None) -> str:
        return NONE if value is None else f"{value:z.2f}"

    lines = [
        (p.method, p.feature, str(p.n), shown(p.spearman), shown(p.r2_task), shown(p.r2_arm))
        for p in account.predictors
    ]
    return Table(("merge", "known before", "n", "rank correlation", "R², new task", "R², new arm"), lines)
