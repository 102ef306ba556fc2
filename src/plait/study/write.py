"""The tables of a finished study as JSON and as a Markdown page: every number from the results, none by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plait.store import staged_file, versions
from plait.study.inference import MARGIN, Comparison, compare
from plait.study.predictors import predictors
from plait.study.schedule import sweep_units, swept
from plait.study.spec import Study
from plait.study.splits import HALVES
from plait.study.table import Row, best_by_half, references, rows_of
from plait.study.units import Layout

RESAMPLES = 2000


def write_tables(layout: Layout, to: Path, *, about: Mapping[str, str], against: str | None = None) -> dict[str, Any]:
    """Reduce a finished study to ``NAME.json`` and ``NAME.md``.

    Args:
        layout: Of the study.
        to: The folder to write into.
        about: What the page says about where it was run: hardware, seconds, command.
        against: The arm the others are compared with; "contrastive", or the first arm where there is none of that name.

    Returns:
        `json`, `markdown` (paths), `rows` (their number).

    Raises:
        RunError: The study is not finished.
    """
    study = layout.study
    rows = rows_of(layout)
    names = [a.name for a in study.study_arms if not a.joint]
    main = against or ("contrastive" if "contrastive" in names else names[0])
    merges = [m for m in ("task_arithmetic", "tsv", "regmean") if m in {r.method for r in rows}]
    compared = compare(layout, rows, main, merges, RESAMPLES)
    found = {
        "name": study.name,
        "about": {**about, **versions()},
        "study": _told(study),
        "rows": [_rounded(asdict(r)) for r in rows],
        "references": [_rounded(r) for r in references(layout)],
        "sweep": [
            _rounded(r) for a in dict.fromkeys(u.arm for u in sweep_units(layout)) for r in swept(layout, study.arm(a))
        ],
        "comparisons": [_rounded(asdict(c)) for c in compared],
        "predictors": [_rounded(p) for p in predictors(layout, rows, merges)],
    }
    made = {"json": to / f"{study.name}.json", "markdown": to / f"{study.name}.md"}
    texts = {
        "json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "markdown": _page(layout, rows, found, compared),
    }
    for kind, path in made.items():
        with staged_file(path, overwrite=True) as stage:
            stage.write_text(texts[kind], encoding="utf-8")
    return {**{k: str(v) for k, v in made.items()}, "rows": len(rows)}


def _told(study: Study) -> dict[str, Any]:
    """The study as it is published: folders of whoever ran it are nobody's business, their names may stay."""
    told: dict[str, Any] = study.model_dump(mode="json", exclude_defaults=True)
    told["base"]["model"] = Path(study.base.model).name if Path(study.base.model).is_absolute() else study.base.model
    told.get("data", {}).pop("root", None)
    return told


def _rounded(value: Any) -> Any:
    """Four decimals, NaN as null: as JSON takes it."""
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(layout: Layout, rows: Sequence[Row], found: Mapping[str, Any], compared: Sequence[Comparison]) -> str:
    study = layout.study
    plain = [r for r in rows if not r.variant]
    methods = list(dict.fromkeys(r.method for r in plain))
    parts = [
        f"# {study.name}",
        study.description,
        _about(found["about"], study),
        "## Each arm under its best merge",
        _MAIN,
    ]
    parts += [
        _best_table(plain),
        "## Every arm and merge",
        "Recovered, %, mean over seeds.",
        _grid_table(plain, methods),
    ]
    parts += ["## References", _references(found["references"]), "## Comparisons", _comparisons(compared)]
    parts += [
        "## The sweep",
        "On the tuning rows, at the tuning seed; merged is the best of the merges.",
        _sweep(found["sweep"]),
    ]
    if variants := [r for r in rows if r.variant]:
        parts += [
            "## Ablations",
            "One setting changed at a time; recovered against the study's own reference.",
            _variants(variants),
        ]
    parts += ["## What tells beforehand", _PREDICTORS, _predictors(found["predictors"])]
    return "\n\n".join(p for p in parts if p) + "\n"


_MAIN = (
    "*recovered* = (merged - floor) / (alone - floor), alone being the best plain arm at its own rate. The merge and its scale"
    " are chosen on one half of the validation rows and reported on the other, halves swapped and averaged; ± is the spread"
    " over seeds (standard deviation). *single* is the arm's own adapters, each on its task. *regret* is what half and twice"
    " the scale lose, in points. `*`: a scale on the edge of what was tried."
)
_PREDICTORS = (
    "Points a task loses by merging against what is known of the adapters: rank correlation with differences between tasks"
    " taken out, and the variance explained on tasks and on arms left out of the fit."
)


def _about(about: Mapping[str, Any], study: Any) -> str:
    said = "; ".join(f"{k} {v}" for k, v in about.items())
    return f"Seeds {', '.join(map(str, study.seeds))}; tuning seed {study.tuning_seed}. {said}."


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; cells are plain text."""
    shown = [" | ".join(cells) for cells in [header, ["---"] * len(header), *lines]]
    return "\n".join(f"| {line} |" for line in shown)


def _best_table(rows: Sequence[Row]) -> str:
    lines = []
    for arm in dict.fromkeys(r.arm for r in rows):
        best = best_by_half(list(rows), arm)
        seeds = sorted({r.seed for r in rows if r.arm == arm})
        mine = {
            s: {h: next(r for r in rows if (r.arm, r.method, r.seed) == (arm, best[h], s)) for h in HALVES}
            for s in seeds
        }
        merged = {s: np.mean([mine[s][h].by_half[h] for h in HALVES]) for s in seeds}
        one = {s: mine[s][HALVES[0]] for s in seeds}
        recovered = [100 * (merged[s] - one[s].floor) / (one[s].plain - one[s].floor) for s in seeds]
        used = [mine[s][h] for s in seeds for h in HALVES]
        worst = min(used, key=lambda r: r.worst_task)
        lines.append(
            (
                float(np.mean(recovered)),
                [
                    f"`{arm}`",
                    " / ".join(dict.fromkeys(best.values())),
                    f"{one[seeds[0]].lr:g}" + (f", step {one[seeds[0]].step}" if one[seeds[0]].step else ""),
                    f"{np.mean([one[s].individual for s in seeds]):.1f}",
                    f"{np.mean(list(merged.values())):.1f}",
                    f"**{np.mean(recovered):.0f}**" + (f" ± {np.std(recovered, ddof=1):.0f}" if len(seeds) > 1 else ""),
                    f"{worst.worst} {worst.worst_task:+.0f}",
                    " / ".join(_regret([getattr(r, k) for r in used]) for k in ("regret_half", "regret_double")),
                    ("*" if any(r.edge for r in used) else ""),
                    str(len(seeds)),
                ],
            )
        )
    header = ["arm", "best merge", "lr", "single", "merged", "recovered, %", "worst task", "regret ½ / 2×", "", "seeds"]
    return markdown_table(header, [cells for _, cells in sorted(lines, key=lambda x: -x[0])])


def _regret(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.1f}" if known else "–"


def _grid_table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    lines = []
    for arm in dict.fromkeys(r.arm for r in rows):
        cells = []
        for method in methods:
            mine = [r for r in rows if (r.arm, r.method) == (arm, method)]
            edge = "*" if any(r.edge for r in mine) else ""
            cells.append(f"{100 * np.mean([r.recovered for r in mine]):.0f}{edge}" if mine else "–")
        lines.append([f"`{arm}`", *cells])
    return markdown_table(["arm", *methods], lines)


def _references(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for key in dict.fromkeys((r["reference"], r["arm"]) for r in found):
        mine = [r for r in found if (r["reference"], r["arm"]) == key]
        score, recovered = (np.mean([r[k] for r in mine if r[k] is not None]) for k in ("score", "recovered"))
        lines.append([key[0], f"`{key[1]}`", f"{score:.1f}", f"{100 * recovered:.0f}", str(len(mine))])
    return markdown_table(["reference", "arm", "score", "recovered, %", "seeds"], lines)


def _comparisons(compared: Sequence[Comparison]) -> str:
    lines = [
        [
            c.merge, f"`{c.arm}` - `{c.other}`", f"{100 * c.difference:+.1f}", f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
            f"{c.p_holm:.3f}", "yes" if c.equivalent else "no", f"{100 * c.detectable:.1f}",
        ]
        for c in compared
    ]  # fmt: skip
    text = (
        f"Differences of recovered, in points; {RESAMPLES} resamples of seeds, tasks and examples, paired; p Holm-corrected"
        f" within a merge; *equivalent*: within ± {100 * MARGIN:.0f} points by two one-sided tests at 5 %; *detectable*: found"
        " with power 0.8."
    )
    header = ["merge", "arms", "difference", "95 % interval", "p (Holm)", "equivalent", "detectable"]
    return text + "\n\n" + markdown_table(header, lines)


def _sweep(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for r in found:
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
    return markdown_table(["arm", "lr", "step", "alone", "delta norm", "merged", "by"], lines)


def _variants(rows: Sequence[Row]) -> str:
    lines = [
        [r.variant, f"`{r.arm}`", r.method, f"{r.individual:.1f}", f"{r.merged:.1f}", f"{100 * r.recovered:.0f}"]
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
