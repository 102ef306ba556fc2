"""Each arm under its own best merge, which is the primary endpoint, and what a wrong scale costs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.evaluation.protocol import STEP
from plait.evaluation.splits import HALVES
from plait.report.table import Row, best_by_half, share
from plait.runs.layout import Layout
from plait.runs.units import FOLDS, MERGE, Unit
from plait.runs.waves import result


@dataclass(frozen=True, slots=True)
class Best:
    """One arm, each half under the merge that the other half finds best; scores in percent, over seeds.

    Args:
        arm: Which.
        merges: Half that is reported -> its merge.
        lr, step: The arm's choice.
        seeds: Which ones it has.
        individual: Its adapters alone, mean.
        merged, recovered: Of each seed; recovered is NaN where the plain arm has learned nothing.
        floor, plain: Of each seed, what recovered is measured between.
        worst, worst_task: The task that loses most against its own adapter in any seed, and how many points.
        regret_half, regret_double: Points lost at half and twice the scale, mean; None where no grid goes so far.
        edge: A chosen scale lies on the edge of what was tried.
    """

    arm: str
    merges: Mapping[str, str]
    lr: float
    step: int
    seeds: tuple[int, ...]
    individual: float
    merged: tuple[float, ...]
    recovered: tuple[float, ...]
    floor: tuple[float, ...]
    plain: tuple[float, ...]
    worst: str
    worst_task: float
    regret_half: float | None
    regret_double: float | None
    edge: bool

    @property
    def mean_recovered(self) -> float:
        """Over seeds; NaN where one of them has none."""
        return float(np.mean(self.recovered))


def best_rows(rows: Sequence[Row]) -> list[Best]:
    """Every arm under its best merge: highest mean recovered first; by merged score where that is not defined.

    Args:
        rows: Of the study itself, without ablations.
    """
    found = [_best([r for r in rows if r.arm == arm]) for arm in dict.fromkeys(r.arm for r in rows)]

    def rank(b: Best) -> tuple[float, float]:
        return (-b.mean_recovered if math.isfinite(b.mean_recovered) else math.inf, -float(np.mean(b.merged)))

    return sorted(found, key=rank)


def _best(mine: list[Row]) -> Best:
    merges = best_by_half(mine, mine[0].arm)
    by_seed = {s: {h: _row(mine, merges[h], s) for h in HALVES} for s in sorted({r.seed for r in mine})}
    one = [halves[HALVES[0]] for halves in by_seed.values()]
    used = [halves[h] for halves in by_seed.values() for h in HALVES]
    merged = [float(np.mean([halves[h].by_half[h] for h in HALVES])) for halves in by_seed.values()]
    worst = min(used, key=lambda r: r.worst_task)
    return Best(
        arm=mine[0].arm,
        merges=merges,
        lr=one[0].lr,
        step=one[0].step,
        seeds=tuple(by_seed),
        individual=float(np.mean([r.individual for r in one])),
        merged=tuple(merged),
        recovered=tuple(share(m, r.floor, r.plain) for m, r in zip(merged, one, strict=True)),
        floor=tuple(r.floor for r in one),
        plain=tuple(r.plain for r in one),
        worst=worst.worst,
        worst_task=worst.worst_task,
        regret_half=_known_mean([r.regret_half for r in used]),
        regret_double=_known_mean([r.regret_double for r in used]),
        edge=any(r.edge for r in used),
    )


def _row(rows: Sequence[Row], method: str, seed: int) -> Row:
    return next(r for r in rows if (r.method, r.seed) == (method, seed))


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def scale_curves(layout: Layout, best: Sequence[Best], merges: Sequence[str]) -> list[dict[str, Any]]:
    """Points won or lost by another scale than the chosen one, on the grid rows of the half that is reported.

    Args:
        layout: Of a finished study.
        best: Its arms.
        merges: Merges to look at, besides each arm's own best.

    Returns:
        Per arm and merge ("best" is the arm's own): `points` = [multiple of the chosen scale, difference], mean over seeds
        and halves, where all of them have that multiple: there, at 1/2 and 2 it is minus the regret.
    """
    found = []
    for b in best:
        for merge in ("best", *merges):
            of_half = b.merges if merge == "best" else dict.fromkeys(HALVES, merge)
            each = [_around(layout, b, of_half[h], s, h) for s in b.seeds for h in HALVES]
            shared = sorted(set.intersection(*(set(e) for e in each)))
            points = [[STEP**i, float(np.mean([e[i] for e in each]))] for i in shared]
            found.append({"arm": b.arm, "merge": merge, "points": points})
    return found


def _around(layout: Layout, b: Best, method: str, seed: int, half: str) -> dict[int, float]:
    """Steps from the chosen scale -> mean score there minus that at the chosen one, of one seed and half."""
    scored = result(layout, Unit(MERGE, seed, b.arm, b.lr, b.step, method, FOLDS))
    chosen = scored["halves"][half]["scale"]
    mean = {r["scale"]: float(np.mean(list(r["tasks"].values()))) for r in scored["grid"] if r["part"] == half}
    return {round(math.log(s / chosen, STEP)): value - mean[chosen] for s, value in mean.items()}
