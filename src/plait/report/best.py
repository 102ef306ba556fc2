"""Each arm under its own best merge, which is the primary endpoint, and what a wrong scale costs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.evaluation.protocol import STEP
from plait.evaluation.splits import HALVES
from plait.report.table import Row, best_by_half, mean, mean_known, recovered
from plait.runs.layout import Layout
from plait.runs.units import FOLDS, MERGE, Unit
from plait.runs.waves import result

__all__ = ["Best", "Curve", "best_rows", "grid_curves", "scale_curves"]


@dataclass(frozen=True, slots=True)
class Best:
    """One arm, each half under the merge that the other half finds best; scores in percent, over seeds.

    Args:
        arm: Name.
        merges: Half that is reported -> its merge.
        lr, step: The arm's choice.
        seeds: Seeds it has.
        individual: Its adapters alone, mean.
        merged: Mean score, of each seed.
        recovered, recovered_of_own: Shares of plain and of the arm's own adapters, of each seed; NaN where these have learned
            nothing.
        floor, plain: What recovered is measured between, of each seed.
        worst, worst_task: The task that loses most against its own adapter in any seed, and how many points.
        regret_half, regret_double: Points lost at half and twice the scale, mean; None where no grid goes so far.
        edge: Whether a chosen scale lies on the edge of what was tried.
    """

    arm: str
    merges: Mapping[str, str]
    lr: float
    step: int
    seeds: tuple[int, ...]
    individual: float
    merged: tuple[float, ...]
    recovered: tuple[float, ...]
    recovered_of_own: tuple[float, ...]
    floor: tuple[float, ...]
    plain: tuple[float, ...]
    worst: str
    worst_task: float
    regret_half: float | None
    regret_double: float | None
    edge: bool

    @property
    def mean_recovered(self) -> float:
        """Average recovered over seeds; NaN where one of them has none."""
        return mean(self.recovered)


def best_rows(rows: Sequence[Row]) -> list[Best]:
    """Reduce rows to one for each arm: highest mean recovered first; by merged score where that is not defined.

    Args:
        rows: Rows of the study itself, without ablations.
    """

    def rank(b: Best) -> tuple[float, float]:
        return (-b.mean_recovered if math.isfinite(b.mean_recovered) else math.inf, -mean(b.merged))

    return sorted((_best([r for r in rows if r.arm == arm]) for arm in dict.fromkeys(r.arm for r in rows)), key=rank)


def _best(mine: list[Row]) -> Best:
    merges = best_by_half(mine, mine[0].arm)
    by_seed = {s: {h: _row(mine, merges[h], s) for h in HALVES} for s in sorted({r.seed for r in mine})}
    one = [halves[HALVES[0]] for halves in by_seed.values()]
    used = [halves[h] for halves in by_seed.values() for h in HALVES]
    merged = [mean(halves[h].by_half[h] for h in HALVES) for halves in by_seed.values()]
    worst = min(used, key=lambda r: r.worst_task)
    return Best(
        arm=mine[0].arm,
        merges=merges,
        lr=one[0].lr,
        step=one[0].step,
        seeds=tuple(by_seed),
        individual=mean(r.individual for r in one),
        merged=tuple(merged),
        recovered=tuple(recovered(m, r.floor, r.plain) for m, r in zip(merged, one, strict=True)),
        recovered_of_own=tuple(recovered(m, r.floor, r.individual) for m, r in zip(merged, one, strict=True)),
        floor=tuple(r.floor for r in one),
        plain=tuple(r.plain for r in one),
        worst=worst.worst,
        worst_task=worst.worst_task,
        regret_half=mean_known(r.regret_half for r in used),
        regret_double=mean_known(r.regret_double for r in used),
        edge=any(r.edge for r in used),
    )


def _row(rows: Sequence[Row], method: str, seed: int) -> Row:
    return next(r for r in rows if (r.method, r.seed) == (method, seed))


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores of an arm and a merge over scales.

    Args:
        arm, merge: Coordinates; merge "best" is the arm's own.
        points: (scale or multiple of the chosen scale, score or difference of scores), ascending.
    """

    arm: str
    merge: str
    points: tuple[tuple[float, float], ...]


def scale_curves(layout: Layout, best: Sequence[Best], merges: Sequence[str]) -> list[Curve]:
    """Read points won or lost by another scale than the chosen one, on the grid rows of the half that is reported.

    Args:
        layout: Layout of a finished run.
        best: Its arms.
        merges: Merges to look at, besides each arm's own best.

    Returns:
        A curve per arm and merge over multiples of the chosen scale, mean over seeds and halves, where all of them have that
        multiple: there, at 1/2 and 2 it is minus the regret. None for an arm where a grid is no ladder of factors sqrt(2).
    """
    curves = []
    for b in best:
        for merge in ("best", *merges):
            of_half = b.merges if merge == "best" else dict.fromkeys(HALVES, merge)
            each = [_around(layout, b, of_half[h], s, h) for s in b.seeds for h in HALVES]
            if all(each):
                shared = sorted(set.intersection(*(set(e) for e in each)))
                curves.append(Curve(b.arm, merge, tuple((STEP**i, mean(e[i] for e in each)) for i in shared)))
    return curves


def _around(layout: Layout, b: Best, method: str, seed: int, half: str) -> dict[int, float]:
    """Steps from the chosen scale -> mean score there minus that at the chosen one, of one seed and half; {} off a ladder."""
    scores = _grid(layout, b, method, seed)[half]
    chosen_scale = result(layout, _unit(b, method, seed))["halves"][half]["scale"]
    steps = {scale: math.log(scale / chosen_scale, STEP) for scale in scores}
    if any(abs(i - round(i)) > 0.01 for i in steps.values()):
        return {}
    return {round(steps[s]): value - scores[chosen_scale] for s, value in scores.items()}


def grid_curves(layout: Layout, best: Sequence[Best], merges: Sequence[str]) -> list[Curve]:
    """Average scores over tasks, seeds and halves at each scale that all of these have tried, per arm and merge."""
    curves = []
    for b in best:
        for merge in merges:
            grids = [_grid(layout, b, merge, s)[h] for s in b.seeds for h in HALVES]
            shared = sorted(set.intersection(*(set(g) for g in grids)))
            curves.append(Curve(b.arm, merge, tuple((s, mean(g[s] for g in grids)) for s in shared)))
    return curves


def _grid(layout: Layout, b: Best, method: str, seed: int) -> dict[str, dict[float, float]]:
    """Half -> scale -> mean score over tasks, on the rows that scales are chosen from."""
    grid = result(layout, _unit(b, method, seed))["grid"]
    return {h: {r["scale"]: mean(r["tasks"].values()) for r in grid if r["part"] == h} for h in HALVES}


def _unit(b: Best, method: str, seed: int) -> Unit:
    return Unit(MERGE, seed, b.arm, b.lr, b.step, method, FOLDS)
