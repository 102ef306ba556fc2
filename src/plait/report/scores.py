"""The long table of a run: one row a number, for whoever wants to compute on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from plait.evaluation.scores import ALONE as ALONE_SCORE
from plait.evaluation.scores import FLOOR, MERGED, Score
from plait.evaluation.splits import HALVES
from plait.report.answers import KeptAnswers
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FOLDS, MERGE, Unit
from plait.runs.waves import all_units, result

__all__ = ["long_table"]


def long_table(layout: Layout) -> Iterator[Score]:
    """Give every reported score of a finished run, and the grids that scales were chosen from.

    `split` is the half of the rows that is reported ("A", "B"), or that a grid was scored on ("grid A", "grid B"). Reported
    rows come with each of the task's metrics and their mean, "score"; grids with the mean alone. Ablations are left out.
    """
    answers = KeptAnswers(layout)
    units = [u for u in dict.fromkeys(all_units(layout)) if u.split == FOLDS and not u.variant]
    for unit in units:
        if unit.stage == ALONE:
            for kind, scale in ((ALONE_SCORE, 1.0), (FLOOR, 0.0)):
                yield from _reported(layout, answers, unit, kind, dict.fromkeys(HALVES, scale))
        elif unit.stage == MERGE:
            scored = result(layout, unit)
            scales = {h: scored["halves"][h]["scale"] for h in HALVES}
            yield from _reported(layout, answers, unit, MERGED, scales)
            yield from _grid(answers, unit, scored["grid"])


def _reported(layout: Layout, answers: KeptAnswers, unit: Unit, kind: str, scales: dict[str, float]) -> Iterator[Score]:
    for task, about in layout.tasks.items():
        for half in HALVES:
            n = len(answers.parts[task].halves[half])
            for metric in (*about.metrics, "score"):
                metrics = None if metric == "score" else [metric]
                key = "" if kind == MERGED else kind
                value = answers.score(unit, key, task, half, np.ones((1, n)), metrics)
                yield Score(unit.arm, kind, unit.merge, scales[half], task, metric, float(value[0]), n, unit.seed, half)


def _grid(answers: KeptAnswers, unit: Unit, grid: list[dict[str, Any]]) -> Iterator[Score]:
    for row in grid:
        for task, value in row["tasks"].items():
            half, n = row["part"], len(answers.parts[task].grid[row["part"]])
            yield Score(unit.arm, MERGED, unit.merge, row["scale"], task, "score", value, n, unit.seed, f"grid {half}")
