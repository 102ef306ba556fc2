"""The tables and figures of a finished study: JSON, a Markdown page and its SVGs, every number from the results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.disk.store import staged_file, versions
from plait.report.best import best_rows, scale_curves
from plait.report.figures import figures_of
from plait.report.inference import infer
from plait.report.matched import matched_rows
from plait.report.predictors import predictors
from plait.report.study_page import page_of
from plait.report.table import LEARNED, Row, references, rows_of
from plait.runs.folder import published
from plait.runs.journal import about_runs
from plait.runs.layout import Layout
from plait.runs.recipe import Recipe as Study
from plait.runs.recipe_file import require_known
from plait.runs.waves import sweep_units, swept

RESAMPLES = 2000


def write_tables(layout: Layout, to: Path, *, about: Mapping[str, str], against: str | None = None) -> dict[str, Any]:
    """Reduce a finished study to ``NAME.json``, ``NAME.md`` and the figures of the page, ``NAME-*.svg``.

    Where adapters alone do not beat the floor by a point, *recovered* is null, comparisons of it too, and `undefined` in the
    JSON (a sentence on the page) says of which seeds and why; scores are there all the same.

    Args:
        layout: Of the study.
        to: The folder to write into.
        about: What the page says about where it was run besides what the runs noted (hardware, executor, seconds); of the
            same key, this.
        against: The arm the others are compared with; "contrastive", or the first arm where there is none of that name.

    Returns:
        `json`, `markdown` (paths), `figures` (their paths), `rows` (their number).

    Raises:
        RunError: The study is not finished.
        UsageError: No arm of the name `against`.
    """
    study = layout.study
    rows = rows_of(layout)
    names = [a.name for a in study.arm_specs if not a.joint]
    main = against or ("contrastive" if "contrastive" in names else names[0])
    require_known(main, names, "arm")
    merges = [m for m in ("task_arithmetic", "tsv", "regmean") if m in {r.method for r in rows}]
    inference = infer(layout, rows, main, merges, RESAMPLES)
    sweep = [r for a in dict.fromkeys(u.arm for u in sweep_units(layout)) for r in swept(layout, study.arm(a))]
    best = best_rows([r for r in rows if not r.variant])
    found = {
        "name": study.name,
        "about": {**about_runs(layout.out), **about, **versions()},
        "study": _told(study),
        "undefined": undefined(rows),
        "rows": [_rounded(asdict(r)) for r in rows],
        "best": [_rounded(asdict(b) | {"interval": inference.intervals.get(b.arm)}) for b in best],
        "references": [_rounded(r) for r in references(layout)],
        "sweep": [_rounded(r) for r in sweep],
        "matched": [_rounded(r) for r in matched_rows(sweep, main)],
        "resamples": RESAMPLES,
        "comparisons": [_rounded(asdict(c)) for c in inference.comparisons],
        "predictors": [_rounded(p) for p in predictors(layout, rows, merges)],
        "scales": _rounded(scale_curves(layout, best, merges)),
    }
    drawn = {name: (f"{study.name}-{name}.svg", svg) for name, svg in figures_of(found, main).items()}
    files = {name: file for name, (file, _) in drawn.items()}
    page = page_of(study, rows, best, inference, found, files, to)
    texts = {f"{study.name}.json": json.dumps(found, indent=1, allow_nan=False) + "\n", f"{study.name}.md": page}
    for file, text in (texts | dict(drawn.values())).items():
        with staged_file(to / file, overwrite=True) as stage:
            stage.write_text(text, encoding="utf-8")
    made = {"json": str(to / f"{study.name}.json"), "markdown": str(to / f"{study.name}.md")}
    return {**made, "figures": [str(to / file) for file, _ in drawn.values()], "rows": len(rows)}


def undefined(rows: Sequence[Row]) -> list[str]:
    """Of which seeds, and ablations, recovered is not defined, a sentence each; none where it always is."""
    found = {}
    for r in rows:
        if math.isnan(r.recovered):
            where = f"seed {r.seed}" + (f" of ablation {r.variant}" if r.variant else "")
            found[where] = (
                f"{where}: adapters alone reach {r.plain:.1f}, the floor is {r.floor:.1f}; a share of a gain below"
                f" {LEARNED:g} point is not reported."
            )
    return [text[0].upper() + text[1:] for text in found.values()]


def _told(study: Study) -> dict[str, Any]:
    """The study as it is published."""
    told: dict[str, Any] = study.model_dump(mode="json", exclude_defaults=True)
    told["base"]["model"] = published(study.base.model)
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
