"""Everything a report says about a finished run, reduced from its results once: the pages and the JSON files only show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.disk.card_contents import contents_of
from plait.disk.card_usage import loading
from plait.disk.store import read_manifest, versions
from plait.options import require_known
from plait.recipes.recipe import Recipe
from plait.report.best import Best, Curve, best_rows, grid_curves, scale_curves
from plait.report.colours import PALETTE, ranked_arms
from plait.report.inference import Inference, Interval, Spread, infer
from plait.report.matched import Matched, Swept, matched_rows
from plait.report.predictors import Predictor, predictors
from plait.report.remarks import Remark, remarks_of
from plait.report.table import LEARNED, ReferenceRow, Row, alone_unit, mean, references, rows_of, task_means
from plait.runs.folder import published
from plait.runs.journal import about_runs
from plait.runs.layout import Layout
from plait.runs.stages import splits
from plait.runs.units import FEATURES
from plait.runs.waves import Choice, chosen, result, sweep_units, swept

__all__ = ["Account", "Measured", "TaskRow", "account_of"]
BEST = "best"  # the folder of the best merge
RESAMPLES = 2000  # of a study, by its protocol
SECONDARY = ("task_arithmetic", "tsv", "regmean")  # a study's secondary endpoints, by its protocol
Shifts = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task under one arm; scores in percent, means over seeds and halves.

    Args:
        arm, task: Coordinates.
        floor: The bare base with the arm's head.
        alone: The arm's own adapter.
        merged: Merge -> score.
        intervals: Merge -> 95 % interval over seeds and examples; None where nothing was resampled.
    """

    arm: str
    task: str
    floor: float
    alone: float
    merged: Mapping[str, float]
    intervals: Mapping[str, Interval | None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a task's score is: the mean of its metrics on validation rows.

    Args:
        metrics: Names.
        rows: Number of rows that are reported, both halves together.
    """

    metrics: tuple[str, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Account:
    """A finished run in numbers.

    Args:
        recipe: What was run.
        about: What is known of where it was run, and versions of packages.
        main: The arm the others are compared with.
        reference: The arm whose adapters alone, less the floor, recovered is a share of.
        rows: A row per arm, merge and seed, and those of the ablations.
        best: Arms under their best merges, the best first.
        tasks: A row per arm and task.
        measured: Task -> what its score is.
        references: What a merge is measured against.
        sweep: What the sweep saw of every arm, rate and moment; empty where nothing was tuned.
        matched: Arms of the sweep where they are alike.
        resamples: Their number.
        inference: What they say.
        predictors: What tells beforehand what a task loses.
        scales: Scores around the chosen scales; `curves`: over the scales themselves.
        interference: Arm -> adapter's task -> other task -> predicted shift, where adapters and statistics are still there.
        undefined: Sentences about seeds in which recovered is not defined.
        remarks: What a reader should know of the results.
        heads: Whether tasks have heads.
        best_folder: What the manifest of the best merge says, where it was written.
        best_place: The folder of the best merge, as a reader finds it: from where the page is made, or from the folder that holds the run.
        loading: Lines of Python that load it from there; "" where it was not written.
    """

    recipe: Recipe
    about: Mapping[str, str]
    main: str
    reference: str
    rows: Sequence[Row]
    best: Sequence[Best]
    tasks: Sequence[TaskRow]
    measured: Mapping[str, Measured]
    references: Sequence[ReferenceRow]
    sweep: Sequence[Swept]
    matched: Sequence[Matched]
    resamples: int
    inference: Inference
    predictors: Sequence[Predictor]
    scales: Sequence[Curve]
    curves: Sequence[Curve]
    interference: Mapping[str, Shifts]
    undefined: Sequence[str]
    remarks: Sequence[Remark]
    heads: bool
    best_folder: Mapping[str, Any] | None
    best_place: str
    loading: str

    @property
    def plain_rows(self) -> list[Row]:
        """The rows without the ablations'."""
        return [r for r in self.rows if not r.variant]

    @property
    def merges(self) -> list[str]:
        """The merges, in the order of the recipe."""
        return list(dict.fromkeys(r.method for r in self.plain_rows))

    def of(self, arm: str, merge: str) -> list[Row]:
        """The rows of an arm and a merge, a seed each, without ablations."""
        return [r for r in self.plain_rows if (r.arm, r.method) == (arm, merge)]

    def spread(self, row: Row) -> Spread:
        """How sure the scores of a row's arm and merge are; empty where they were not resampled."""
        return self.inference.spreads.get((row.arm, row.method), Spread())


def account_of(layout: Layout, *, about: Mapping[str, str] | None = None, against: str | None = None) -> Account:
    """Reduce a finished run.

    Args:
        layout: Layout of the run, tuned or not; neither its base nor its data need be there.
        about: What the page says about where it was run besides what the runs noted; of the same key, this.
        against: The arm the others are compared with; "contrastive", or the first arm where there is none of that name.

    Raises:
        RunError: It is not finished.
        UsageError: No arm of the name `against`.
    """
    recipe, rows = layout.recipe, rows_of(layout)
    names = [a.name for a in recipe.arm_specs if not a.joint]
    main = against or ("contrastive" if "contrastive" in names else names[0])
    require_known(main, names, "arm")
    tried = list(dict.fromkeys(r.method for r in rows))
    sweep = [r for a in dict.fromkeys(u.arm for u in sweep_units(layout)) for r in swept(layout, recipe.arm(a))]
    merges = [m for m in SECONDARY if m in tried] if sweep else tried
    resamples = RESAMPLES if sweep else recipe.evaluation.resamples
    inference = infer(layout, rows, main, merges, resamples)
    plain = [r for r in rows if not r.variant]
    best, compared_with = best_rows(plain), references(layout)
    shown = ranked_arms(main, [b.arm for b in best])[: len(PALETTE)]
    best_folder = layout.out.resolve() / BEST
    return Account(
        recipe=recipe,
        about={**about_runs(layout.out), **(about or {}), **versions()},
        main=main,
        reference=compared_with[0].arm,
        rows=rows,
        best=best,
        tasks=_task_rows(layout, plain, inference),
        measured=_measured(layout),
        references=compared_with,
        sweep=sweep,
        matched=matched_rows(sweep, main),
        resamples=resamples,
        inference=inference,
        predictors=predictors(layout, rows, merges),
        scales=scale_curves(layout, best, merges),
        curves=grid_curves(layout, best, merges),
        interference=_interference(layout, shown),
        undefined=_undefined(rows),
        remarks=remarks_of(layout, plain),
        heads=any(t.kind in ("classification", "regression") for t in layout.tasks.values()),
        best_folder=(read_manifest(best_folder) or {}).get("result") if best_folder.is_dir() else None,
        best_place=_place_of(best_folder)[0],
        loading=_loading(best_folder, recipe.base.model),
    )


def _measured(layout: Layout) -> dict[str, Measured]:
    """Read what each task is scored by, and on how many rows."""
    parts = splits(layout)
    return {
        name: Measured(tuple(task.metrics), sum(len(rows) for rows in parts[name].halves.values()))
        for name, task in layout.tasks.items()
    }


def _task_rows(layout: Layout, rows: Sequence[Row], inference: Inference) -> list[TaskRow]:
    """Average every arm's scores task by task."""
    lines = []
    for arm in dict.fromkeys(r.arm for r in rows):
        mine = [r for r in rows if r.arm == arm]
        seeds = {r.seed: alone_unit(arm, Choice(r.lr, r.step), r.seed) for r in mine}
        scores = [result(layout, unit) for unit in seeds.values()]
        floor, alone = ([task_means(s, kind) for s in scores] for kind in ("floor", "alone"))
        methods = list(dict.fromkeys(r.method for r in mine))
        for task in mine[0].tasks:
            merged = {m: mean(r.tasks[task] for r in mine if r.method == m) for m in methods}
            intervals = {m: inference.spreads.get((arm, m), Spread()).tasks.get(task) for m in methods}
            lines.append(
                TaskRow(arm, task, mean(f[task] for f in floor), mean(a[task] for a in alone), merged, intervals)
            )
    return lines


def _interference(layout: Layout, arms: Sequence[str]) -> dict[str, Shifts]:
    """Read how adapters of the first seed are predicted to disturb each other; without arms that nobody has measured."""
    shifts: dict[str, Shifts] = {}
    for arm in arms:
        alone = alone_unit(arm, chosen(layout, layout.recipe.arm(arm)), layout.recipe.seeds[0])
        unit = replace(alone, stage=FEATURES)
        if layout.done(unit) and (known := result(layout, unit).get("shifts")):  # earlier studies do not have it
            shifts[arm] = {i: {j: math.nan if s is None else s for j, s in row.items()} for i, row in known.items()}
    return shifts


def _undefined(rows: Sequence[Row]) -> list[str]:
    """Say of which seeds, and ablations, recovered is not defined, a sentence each; none where it always is."""
    sentences = {}
    for r in rows:
        if math.isnan(r.recovered):
            where = f"seed {r.seed}" + (f" of ablation {r.variant}" if r.variant else "")
            sentences[where] = (
                f"{where}: adapters alone reach {r.plain:z.1f}, the floor is {r.floor:z.1f}; a share of a gain below"
                f" {LEARNED:g} point is not reported."
            )
    return [text[0].upper() + text[1:] for text in sentences.values()]


def _place_of(best: Path) -> tuple[str, str]:
    """Give the path by which a reader finds the best merge, and from where: the folder this is called in, if that holds it."""
    here = Path.cwd()
    if here in best.parents:
        return best.relative_to(here).as_posix(), "seen from where this page was made"
    return f"{best.parent.name}/{best.name}", f"seen from the folder that holds {best.parent.name}"


def _loading(best: Path, base: str) -> str:
    """Give the lines that load the best merge, which are those of its card."""
    contents = contents_of(best) if best.is_dir() else None
    if contents is None:
        return ""
    return loading(replace(contents, base_called=published(base) or contents.base_called), *_place_of(best))
