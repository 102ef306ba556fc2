"""Which number known before merging tells what a merge will cost a task: rank correlations and cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.evaluation.features import FEATURES
from plait.report.table import Row, task_means
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FOLDS, Unit
from plait.runs.units import FEATURES as FEATURES_STAGE
from plait.runs.waves import result

Floats = npt.NDArray[np.float64]


def predictors(layout: Layout, rows: Sequence[Row], methods: Sequence[str]) -> list[dict[str, Any]]:
    """How well each feature predicts the points a task loses by merging.

    Args:
        layout: Of a finished study.
        rows: Its rows.
        methods: Merges to look at.

    Returns:
        Per merge and feature: `spearman` over all (arm, seed, task) with differences between tasks taken out, and `r2_task`
        and `r2_arm`: the share of variance that a line fitted to the log of the feature explains on tasks, and on arms,
        that it has not seen (below 0: worse than the mean).
    """
    found = []
    for method in methods:
        table = _table(layout, [r for r in rows if r.method == method and not r.variant])
        loss, task, arm = table["loss"], table["task"], table["arm"]
        for name in FEATURES:
            x = np.log(np.maximum(table[name].astype(np.float64), 1e-12))
            found.append(
                {
                    "method": method,
                    "feature": name,
                    "n": len(loss),
                    "spearman": _rank_correlation(_centred(x, task), _centred(loss, task)),
                    "r2_task": _held_out(x, loss, task),
                    "r2_arm": _held_out(x, loss, arm),
                }
            )
    return found


def _table(layout: Layout, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, list[Any]] = {k: [] for k in ("loss", "task", "arm", *FEATURES)}
    for row in rows:
        unit = Unit(FEATURES_STAGE, row.seed, row.arm, row.lr, row.step, split=FOLDS)
        if not layout.done(unit):
            continue
        known = result(layout, unit)["tasks"]
        own = task_means(result(layout, Unit(ALONE, row.seed, row.arm, row.lr, row.step, split=FOLDS)), "alone")
        for task, merged in row.tasks.items():
            columns["loss"].append(own[task] - merged)
            columns["task"].append(task)
            columns["arm"].append(row.arm)
            for name in FEATURES:
                columns[name].append(known[task][name])
    return {k: np.array(v) for k, v in columns.items()}


def _centred(values: Floats, group: npt.NDArray[Any]) -> Floats:
    found = values.astype(np.float64).copy()
    for g in np.unique(group):
        found[group == g] -= found[group == g].mean()
    return found


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
