"""What a page says about a run, section by section: texts, tables and figures, before they are HTML or Markdown.

Texts and cells are in the small part of Markdown that both pages know: `code`, **strong** and *emphasis*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from plait.disk.store import versions
from plait.report.account import BEST, Account
from plait.report.inference import MARGIN, Comparison
from plait.report.sweep_sections import matched_section, sweep_section
from plait.report.table import mean
from plait.report.words import NONE, Section, Table, between, percent, points, signed
from plait.runs.folder import published
from plait.runs.sections import PLAIN_ARMS

__all__ = ["about_lines", "sections_of", "verdict"]


def verdict(account: Account) -> str:
    """Say in a sentence or two what came out."""
    first = account.best[0]
    if account.undefined:
        return "**Not defined here**: recovered, and what is derived from it, stays empty (–). " + " ".join(
            account.undefined
        )
    interval = account.inference.intervals.get(first.arm)
    sure = f" (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    merges = " / ".join(dict.fromkeys(first.merges.values()))
    whose = "plain adapters gain" if account.reference in PLAIN_ARMS else f"the adapters of `{account.reference}` gain"
    text = (
        f"Merged into one, adapters of `{first.arm}` keep **{percent(first.mean_recovered)} %**{sure} of what {whose} alone,"
        f" under {merges}. The task that loses most against its own adapter is {first.worst} ({signed(first.worst_task)}"
        " points)."
    )
    plain = next((b for b in account.best if b.arm == account.reference and b is not first), None)
    return text + (f" `{plain.arm}` keeps {percent(plain.mean_recovered)} %." if plain else "")


def about_lines(account: Account) -> list[str]:
    """List what is known of where it was run, and the versions of the packages that made the page."""
    packages, recipe = versions(), account.recipe
    lines = [f"{k}: {f'`{v}`' if k == 'command' else v}" for k, v in account.about.items() if k not in packages]
    software = ", ".join(f"{k} {v}" for k, v in account.about.items() if k in packages)
    tuning = f"; tuning seed: {recipe.tuning_seed}" if account.sweep else ""
    return [
        f"seeds: {', '.join(map(str, recipe.seeds))}{tuning}",
        *lines,
        *([f"page made with: {software}"] if software else []),
    ]


def sections_of(account: Account) -> list[Section]:
    """Put a run's account into sections; those without content are left out."""
    sections = [
        _best(account),
        _scales(account),
        Section("Every arm and merge", "Recovered of plain, %, mean over seeds.", (_grid(account), _every(account))),
        Section("Task by task", _TASKS.format(count=account.resamples), (_tasks(account),)),
        Section("References", "", (_references(account),)),
        Section("Comparisons", _comparisons_text(account), (_comparisons(account.inference.comparisons),)),
        sweep_section(account.sweep),
        matched_section(account.matched),
        Section(
            "Ablations",
            "One setting changed at a time; recovered against the study's own reference.",
            (_ablations(account),),
        ),
        Section("What tells beforehand", _PREDICTORS, (_predictors(account),)),
        Section("What the statistics predict", _SHIFTS if account.interference else "", figure="interference"),
        _best_folder(account),
    ]
    return [s for s in sections if any(t.rows for t in s.tables) or (s.text and not s.tables)]


_MAIN = (
    "*recovered* = (merged - floor) / (alone - floor), alone being {alone}, the same for all arms; *of own*: alone being the"
    " arm's own adapters, which flatters an arm that is poor alone. The merge and its scale are chosen on one half of the"
    " validation rows and reported on the other, halves swapped and averaged. {interval}± is the spread over seeds (standard"
    " deviation). *single* is the arm's own adapters, each on its task. *floor* is the base with the task heads and no adapter,"
    " {floor:.1f} in the mean. *regret* is what half and twice the scale lose, in points. `*`: a scale on the edge of what was"
    " tried."
)
_SCALES = (
    "Points won or lost by a multiple of the chosen scale, which was chosen on the other half: mean over tasks, halves and"
    " seeds, on the grid rows of the reported half. Colours are the same in all figures; grey: the other arms."
)
_CURVES = (
    "Mean score over tasks, halves and seeds against the scale that multiplies the merged update, on the rows that scales are"
    " chosen from. A flat top forgives a wrong guess."
)
_TASKS = (
    "Mean scores over seeds and halves, percent. *floor* and *alone*: the base with the arm's head, without and with the task's"
    " own adapter. In parentheses the 95 % interval of {count} resamples of seeds and examples."
)
_PREDICTORS = (
    "Points a task loses by merging against what is known of the adapters: rank correlation with differences between tasks"
    " taken out, and the variance explained on tasks and on arms left out of the fit."
)
_SHIFTS = (
    "Relative output shift that each adapter (row) causes on each task's inputs (column), mean over modules, computed from the"
    " statistics files alone, first seed. The diagonal is what an adapter does for its own task; everything else is"
    " interference."
)


def _best(account: Account) -> Section:
    reference = account.reference
    alone = "the best plain arm at its own rate" if reference in PLAIN_ARMS else f"those of `{reference}`"
    resampled = f"The 95 % interval comes from {account.resamples} resamples of seeds, tasks and examples; "
    text = _MAIN.format(
        alone=alone,
        interval=resampled if account.resamples > 1 else "",
        floor=mean(r.floor for r in account.plain_rows),
    )
    lines = []
    for b in account.best:
        interval = account.inference.intervals.get(b.arm)
        spread = f" ± {percent(float(np.std(b.recovered, ddof=1)))}" if len(b.seeds) > 1 else ""
        lines.append(
            (
                f"`{b.arm}`",
                " / ".join(dict.fromkeys(b.merges.values())),
                f"{b.lr:g}" + (f", step {b.step}" if b.step else ""),
                f"{b.individual:.1f}",
                f"{mean(b.merged):.1f}",
                f"**{percent(b.mean_recovered)}**{spread}" if math.isfinite(b.mean_recovered) else NONE,
                f"{percent(interval[0])} to {percent(interval[1])}" if interval else NONE,
                percent(mean(b.recovered_of_own)),
                f"{b.worst} {b.worst_task:+.0f}",
                " / ".join(points(r) for r in (b.regret_half, b.regret_double)),
                "*" if b.edge else "",
                str(len(b.seeds)),
            )
        )
    header = ["arm", "best merge", "lr", "single", "merged", "recovered, %", "95 % interval", "of own, %", "worst task"]
    table = Table((*header, "regret ½ / 2×", "", "seeds"), lines)
    return Section("Each arm under its best merge", text, (table,), "recovered", tuple(account.notes))


def _scales(account: Account) -> Section:
    if account.scales:
        return Section("Another scale than the chosen one", _SCALES, figure="scales")
    several = any(len(c.points) > 1 for c in account.curves)
    return Section("How much the scale matters", _CURVES if several else "", figure="curves")


def _grid(account: Account) -> Table:
    lines = []
    for arm in dict.fromkeys(r.arm for r in account.plain_rows):
        cells = []
        for merge in account.merges:
            mine = account.of(arm, merge)
            edge = "*" if any(r.edge for r in mine) else ""
            cells.append(percent(mean(r.recovered for r in mine)) + edge if mine else NONE)
        lines.append((f"`{arm}`", *cells))
    return Table(("arm", *account.merges), lines)


def _every(account: Account) -> Table:
    lines = []
    for arm in dict.fromkeys(r.arm for r in account.plain_rows):
        for merge in account.merges:
            if not (mine := account.of(arm, merge)):
                continue
            spread, worst = account.spread(mine[0]), min(mine, key=lambda r: r.worst_task)
            scales = sorted({s for r in mine for s in r.scales})
            lines.append(
                (
                    f"`{arm}`",
                    merge,
                    f"{mean(r.individual for r in mine):.1f}",
                    f"{mean(r.merged for r in mine):.1f}" + (f" ± {spread.merged:.1f}" if spread.merged else ""),
                    percent(mean(r.recovered for r in mine))
                    + (f" ± {percent(spread.recovered)}" if spread.recovered else ""),
                    percent(mean(r.recovered_of_own for r in mine)),
                    f"{worst.worst} {signed(worst.worst_task)}",
                    ", ".join(f"{s:.3g}" for s in scales) + ("*" if any(r.edge for r in mine) else ""),
                )
            )
    header = ("arm", "merge", "single", "merged", "recovered, %", "of own, %", "worst task", "chosen scales")
    return Table(header, lines, note="± is one standard error over seeds and examples, the tasks being these.")


def _tasks(account: Account) -> Table:
    lines = []
    for t in account.tasks:
        cells = []
        for merge in account.merges:
            interval = t.intervals.get(merge)
            sure = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
            cells.append(f"{t.merged[merge]:.1f}{sure}" if merge in t.merged else NONE)
        lines.append((f"`{t.arm}`", t.task, f"{t.floor:.1f}", f"{t.alone:.1f}", *cells))
    return Table(("arm", "task", "floor", "alone", *account.merges), lines)


def _references(account: Account) -> Table:
    lines = []
    for name, arm in dict.fromkeys((r.reference, r.arm) for r in account.references):
        mine = [r for r in account.references if (r.reference, r.arm) == (name, arm)]
        share = percent(mean(r.recovered for r in mine))
        lines.append((name, f"`{arm}`", f"{mean(r.score for r in mine):.1f}", share, str(len(mine))))
    return Table(("reference", "arm", "score", "recovered, %", "seeds"), lines)


def _comparisons_text(account: Account) -> str:
    text = (
        f"Differences of recovered, in points; {account.resamples} resamples of seeds, tasks and examples, paired; p"
        f" Holm-corrected within a merge; *equivalent*: within ± {100 * MARGIN:.0f} points by two one-sided tests at 5 %;"
        " *detectable*: found with power 0.8. *Here*: the tasks are not resampled, which says what holds of these very tasks"
        " and no others."
    )
    reasons = dict.fromkeys(f"{c.merge}: {c.undefined}." for c in account.inference.comparisons if c.undefined)
    return "\n\n".join([text, *reasons])


def _comparisons(compared: Sequence[Comparison]) -> Table:
    header = ("merge", "arms", "difference", "95 % interval", "p (Holm)", "equivalent", "detectable", "here")
    lines = [
        (
            c.merge, f"`{c.arm}` - `{c.other}`", percent(c.difference, "+.1f"), between(c.low, c.high), _p(c.p_holm),
            {True: "yes", False: "no", None: NONE}[c.equivalent], percent(c.detectable, ".1f"),
            between(c.low_here, c.high_here), _p(c.p_here),
        )
        for c in compared
    ]  # fmt: skip
    return Table((*header, "p here (Holm)"), lines)


def _p(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _ablations(account: Account) -> Table:
    lines = [
        (r.variant, f"`{r.arm}`", r.method, f"{r.individual:.1f}", f"{r.merged:.1f}", percent(r.recovered))
        for r in account.rows
        if r.variant
    ]
    return Table(("changed", "arm", "merge", "single", "merged", "recovered, %"), lines)


def _predictors(account: Account) -> Table:
    def shown(value: float | None) -> str:
        return NONE if value is None else f"{value:.2f}"

    lines = [
        (p.method, p.feature, str(p.n), shown(p.spearman), shown(p.r2_task), shown(p.r2_arm))
        for p in account.predictors
    ]
    return Table(("merge", "known before", "n", "rank correlation", "R², new task", "R², new arm"), lines)


def _best_folder(account: Account) -> Section:
    if (best := account.best_folder) is None:
        return Section("The best merge", "")
    text = (
        f"The folder `{BEST}` of this run is a PEFT adapter: `{best['arm']}` under {best.get('merge') or best['method']}, seed"
        f" {best['seed']}, at scale {best['scale']:.3g}, which is already in its factors."
    )
    base, tasks = published(account.recipe.base.model), best["tasks"]
    load = f'PeftModel.from_pretrained(model, "{BEST}")  # over {base}'
    if not account.heads:
        return Section("The best merge", text, code=f"from peft import PeftModel\n\nmodel = {load}")
    text += " It holds the heads of all tasks; `load_head` puts in one of them, over a model with as many labels."
    code = f'model = {load}\nplait.load_head(model, "{BEST}", "{next(iter(tasks))}")'
    return Section("The best merge", text, code=f"import plait\nfrom peft import PeftModel\n\n{code}")
