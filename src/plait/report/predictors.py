"""Which number known before merging tells what a merge will cost a task: rank correlations and cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.evaluation.bootstrap import Floats
from plait.evaluation.features import FEATURES
from plait.report.table import Row, alone_unit, task_means
from plait.runs.layout import Layout
from plait.runs.units import FEATURES as FEATURES_STAGE
from plait.runs.waves import Choice, result

__all__ = ["Predictor", "predictors"]


@dataclass(frozen=True, slots=True)
class Predictor:
    """How well something known before merging predicts the points a task loses by it.

    Args:
        method: Name of the merge.
        feature: Name of what is known (`plait.evaluation.features`).
        n: Number of (arm, seed, task).
        spearman: Rank correlation over all of them, differences between tasks taken out.
        r2_task, r2_arm: Share of variance that a line fitted to the log of the feature explains on tasks, and on arms, that it
            has not seen (below 0: worse than the mean).
    """

    method: str
    feature: str
    n: int
    spearman: float | None
    r2_task: float | None
    r2_arm: float | None


def predictors(layout: Layout, rows: Sequence[Row], methods: Sequence[str]) -> list[Predictor]:
    """Tell how well each feature predicts the points a task loses by merging.

    Args:
        layout: Layout of a finished run.
        rows: Its rows.
        methods: Merges to look at.
    """
    lines = []
    for method in methods:
        table = _table(layout, [r for r in rows if r.method == method and not r.variant])
        loss, task, arm = table["loss"], table["task"], table["arm"]
        for name in FEATURES if len(loss) else ():
            x = np.log(np.maximum(table[name].astype(np.float64), 1e-12))
            correlation = _rank_correlation(_centred(x, task), _centred(loss, task))
            held_out = (_held_out(x, loss, group) for group in (task, arm))
            lines.append(Predictor(method, name, len(loss), correlation, *held_out))
    return lines


def _table(layout: Layout, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    """Columns of points lost, task, arm and features, one line for each (arm, seed, task) whose features were measured."""
    columns: dict[str, list[Any]] = {k: [] for k in ("loss", "task", "arm", *FEATURES)}
    for row in rows:
        alone = alone_unit(row.arm, Choice(row.lr, row.step), row.seed)
        unit = replace(alone, stage=FEATURES_STAGE)
        if not layout.done(unit):
            continue
        known, own = result(layout, unit)["tasks"], task_means(result(layout, alone), "alone")
        for task, merged in row.tasks.items():
            columns["loss"].append(own[task] - merged)
            columns["task"].append(task)
            columns["arm"].append(row.arm)
            for name in FEATURES:
                columns[name].append(known[task][name])
    return {k: np.array(v) for k, v in columns.items()}


def _centred(values: Floats, group: npt.NDArray[Any]) -> Floats:
    centred: Floats = values.astype(np.float64).copy()
    for g in np.unique(group):
        centred[group == g] -= centred[group == g].mean()
    return centred


def _rank_correlation(x: Floats, y: Floats) -> float | None:
    from scipy.stats import spearmanr

    if np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return None
    return float(spearmanr(x, y).statistic)


def _held_out(x: Floats, y: Floats, group: npt.NDArray[Any]) -> float | None:
    """1 - squared error / variance, each group predicted by a line fitted to the others."""
    if len(np.unique(group)) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return None
    error, spread = 0.0, 0.0
    for g in np.unique(group):
        seen, held = group != g, group == g
        line = np.polyfit(x[seen], y[seen], 1) if np.ptp(x[seen]) > 1e-9 else np.array([0.0, y[seen].mean()])
        error += float(((np.polyval(line, x[held]) - y[held]) ** 2).sum())
        spread += float(((y[seen].mean() - y[held]) ** 2).sum())
    return 1.0 - error / spread if spread > 0 else None
