"""The page of a finished study, in Markdown: what its results say, and nothing by hand."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.disk.store import versions
from plait.report.best import Best
from plait.report.inference import MARGIN, Comparison, Inference
from plait.report.markdown import markdown_table
from plait.report.sweep_page import sweep_sections
from plait.report.table import Row
from plait.runs.recipe import Recipe as Study


def page_of(
    study: Study,
    rows: Sequence[Row],
    best: Sequence[Best],
    inference: Inference,
    found: Mapping[str, Any],
    figures: Mapping[str, str],
    to: Path,
) -> str:
    """The page.

    Args:
        study: The study.
        rows: All of its rows.
        best: Arms under their best merges, in the order of the main table.
        inference: Intervals and comparisons.
        found: The JSON file, for what is shown as it stands there.
        figures: Name -> file; each is put where its table is.
        to: The folder the page goes into, where links start.
    """
    plain = [r for r in rows if not r.variant]
    shown = {name: f"![{_FIGURES[name]}]({file})" for name, file in figures.items()}
    methods = list(dict.fromkeys(r.method for r in plain))
    parts = [
        f"# {study.name}",
        linked(study.description, to),
        _about(found["about"], study),
        "## Each arm under its best merge",
        *([_undefined(found["undefined"])] if found["undefined"] else []),
        _MAIN.format(count=found["resamples"]),
        _best_table(best, inference),
        shown["recovered"],
        "## Another scale than the chosen one",
        _SCALES,
        shown["scales"],
        "## Every arm and merge",
        "Recovered, %, mean over seeds.",
        _grid_table(plain, methods),
    ]
    parts += [
        "## References",
        _references(found["references"]),
        "## Comparisons",
        _comparisons(inference.comparisons, found["resamples"]),
    ]
    parts += sweep_sections(found["sweep"], found["matched"], shown["sweep"])
    if variants := [r for r in rows if r.variant]:
        parts += [
            "## Ablations",
            "One setting changed at a time; recovered against the study's own reference.",
            _variants(variants),
        ]
    parts += ["## What tells beforehand", _PREDICTORS, _predictors(found["predictors"])]
    return "\n\n".join(p for p in parts if p) + "\n"


_PAGES = re.compile(r"\bdocs/[\w./-]+\.md\b")


def linked(text: str, to: Path) -> str:
    """A text whose ``docs/...md`` are links from a folder, where that folder lies in a tree that has them."""
    start = to.resolve()

    def link(found: re.Match[str]) -> str:
        pages = (root / found[0] for root in (start, *start.parents))
        page = next((p for p in pages if p.is_file()), None)
        return f"[{found[0]}]({Path(os.path.relpath(page, start)).as_posix()})" if page else found[0]

    return _PAGES.sub(link, text)


_FIGURES = {
    "recovered": "recovered by arm",
    "scales": "points lost by scale",
    "sweep": "the sweep: learning rate, single scores, delta norms",
}
_MAIN = (
    "*recovered* = (merged - floor) / (alone - floor), alone being the best plain arm at its own rate. The merge and its scale"
    " are chosen on one half of the validation rows and reported on the other, halves swapped and averaged. The 95 %"
    " interval comes from {count} resamples of seeds, tasks and examples; ± is the spread over seeds (standard deviation)."
    " *single* is the arm's own adapters, each on its task. *regret* is what half and twice the scale lose, in points. `*`: a"
    " scale on the edge of what was tried."
)
_SCALES = (
    "Points won or lost by a multiple of the chosen scale, which was chosen on the other half: mean over tasks, halves and"
    " seeds, on the grid rows of the reported half. Colours are the same in all figures; grey: the other arms."
)
_PREDICTORS = (
    "Points a task loses by merging against what is known of the adapters: rank correlation with differences between tasks"
    " taken out, and the variance explained on tasks and on arms left out of the fit."
)


def _undefined(reasons: Sequence[str]) -> str:
    return "**Not defined here**: recovered, and what is derived from it, stays empty (–). " + " ".join(reasons)


def _percent(share: float | None, form: str = ".0f") -> str:
    """A share in percent; a dash where it is not defined."""
    return "–" if share is None or not math.isfinite(share) else format(100 * share, form)


def _about(about: Mapping[str, Any], study: Study) -> str:
    """A line each for what was said of the run, one for the versions of the packages."""
    packages = versions()
    said = [f"- {k}: {f'`{v}`' if k == 'command' else v}" for k, v in about.items() if k not in packages]
    software = ", ".join(f"{k} {v}" for k, v in about.items() if k in packages)
    seeds = f"- seeds: {', '.join(map(str, study.seeds))}; tuning seed: {study.tuning_seed}"
    return "\n".join([seeds, *said, *([f"- page made with: {software}"] if software else [])])


def _best_table(best: Sequence[Best], inference: Inference) -> str:
    lines = []
    for b in best:
        interval = inference.intervals.get(b.arm)
        spread = f" ± {_percent(float(np.std(b.recovered, ddof=1)))}" if len(b.seeds) > 1 else ""
        defined = math.isfinite(b.mean_recovered)
        lines.append(
            [
                f"`{b.arm}`",
                " / ".join(dict.fromkeys(b.merges.values())),
                f"{b.lr:g}" + (f", step {b.step}" if b.step else ""),
                f"{b.individual:.1f}",
                f"{np.mean(b.merged):.1f}",
                f"**{_percent(b.mean_recovered)}**{spread}" if defined else "–",
                f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "–",
                f"{b.worst} {b.worst_task:+.0f}",
                " / ".join("–" if r is None else f"{r:.1f}" for r in (b.regret_half, b.regret_double)),
                "*" if b.edge else "",
                str(len(b.seeds)),
            ]
        )
    header = ["arm", "best merge", "lr", "single", "merged", "recovered, %", "95 % interval", "worst task"]
    return markdown_table([*header, "regret ½ / 2×", "", "seeds"], lines)


def _grid_table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    lines = []
    for arm in dict.fromkeys(r.arm for r in rows):
        cells = []
        for method in methods:
            mine = [r for r in rows if (r.arm, r.method) == (arm, method)]
            edge = "*" if any(r.edge for r in mine) else ""
            cells.append(_percent(float(np.mean([r.recovered for r in mine]))) + edge if mine else "–")
        lines.append([f"`{arm}`", *cells])
    return markdown_table(["arm", *methods], lines)


def _references(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for key in dict.fromkeys((r["reference"], r["arm"]) for r in found):
        mine = [r for r in found if (r["reference"], r["arm"]) == key]
        score, known = np.mean([r["score"] for r in mine]), [r["recovered"] for r in mine]
        recovered = None if None in known else float(np.mean(known))
        lines.append([key[0], f"`{key[1]}`", f"{score:.1f}", _percent(recovered), str(len(mine))])
    return markdown_table(["reference", "arm", "score", "recovered, %", "seeds"], lines)


def _comparisons(compared: Sequence[Comparison], resamples: int) -> str:
    lines = [
        [
            c.merge, f"`{c.arm}` - `{c.other}`", _percent(c.difference, "+.1f"), _between(c.low, c.high),
            _p(c.p_holm), {True: "yes", False: "no", None: "–"}[c.equivalent],
            _percent(c.detectable, ".1f"), _between(c.low_here, c.high_here), _p(c.p_here),
        ]
        for c in compared
    ]  # fmt: skip
    text = (
        f"Differences of recovered, in points; {resamples} resamples of seeds, tasks and examples, paired; p Holm-corrected"
        f" within a merge; *equivalent*: within ± {100 * MARGIN:.0f} points by two one-sided tests at 5 %; *detectable*: found"
        " with power 0.8. *Here*: the tasks are not resampled, which says what holds of these very tasks and no others."
    )
    header = [
        "merge",
        "arms",
        "difference",
        "95 % interval",
        "p (Holm)",
        "equivalent",
        "detectable",
        "here",
        "p here (Holm)",
    ]
    reasons = dict.fromkeys(f"{c.merge}: {c.undefined}." for c in compared if c.undefined)
    return "\n\n".join([text, *reasons, markdown_table(header, lines)])


def _between(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{_percent(low, '+.1f')} to {_percent(high, '+.1f')}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _variants(rows: Sequence[Row]) -> str:
    lines = [
        [r.variant, f"`{r.arm}`", r.method, f"{r.individual:.1f}", f"{r.merged:.1f}", _percent(r.recovered)]
        for r in rows
    ]
    return markdown_table(["changed", "arm", "merge", "single", "merged", "recovered, %"], lines)


def _predictors(found: Sequence[Mapping[str, Any]]) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    lines = [
        [p["method"], p["feature"], str(p["n"]), *(shown(p[k]) for k in ("spearman", "r2_task", "r2_arm"))]
        for p in found
    ]
    return markdown_table(["merge", "known before", "n", "rank correlation", "R², new task", "R², new arm"], lines)
