"""How sure differences between arms are: a bootstrap paired over seeds, tasks and examples, Holm, and equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from plait.errors import UsageError
from plait.evaluation.bootstrap import Floats
from plait.evaluation.splits import HALVES
from plait.report.answers import KeptAnswers
from plait.report.table import LEARNED, Row, best_by_half, recovered, reference_unit
from plait.runs.layout import Layout
from plait.runs.units import FOLDS, MERGE, Unit
from plait.runs.waves import chosen

__all__ = ["MARGIN", "NOTHING_LEARNED", "Comparison", "Inference", "Resampled", "Spread", "infer", "resample"]
NOTHING_LEARNED = f"adapters alone do not beat the floor by {LEARNED:g} point: there is no gain to recover a share of"
MARGIN = 0.05  # of recovered: arms nearer than that are called equivalent
_POWER = 2.80  # standard errors of a difference that a two-sided 5 % test finds with power 0.8
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another under one merge (or each under its own best).

    Args:
        arm, other, merge: Coordinates; merge "best" is each arm's own.
        difference: Mean recovered of `arm` minus that of `other`.
        low, high: 95 % interval.
        p: Two-sided.
        p_holm: Corrected for all comparisons of one merge.
        equivalent: Whether two one-sided tests at 5 % put the difference within `MARGIN`.
        detectable: Smallest difference found with power 0.8.
        low_here, high_here, p_here: Interval and p of these very tasks, which are not drawn then: seeds and examples alone;
            p Holm-corrected too. What may be said of tasks like these is `low`, `high` and `p_holm`.
        undefined: Why there are no numbers: all of them are None then; "" where there are.
    """

    arm: str
    other: str
    merge: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    equivalent: bool | None = None
    detectable: float | None = None
    low_here: float | None = None
    high_here: float | None = None
    p_here: float | None = None
    undefined: str = ""


@dataclass(frozen=True, slots=True)
class Resampled:
    """Scores of arms and merges in every resample, all from the same draws of seeds, tasks and examples.

    Args:
        values: (arm, merge) -> (seeds, tasks, 1 + resamples) score of resampled examples, percent; the first as they are.
        low, high: (seeds, tasks, 1 + resamples) of the floor and of the plain reference.
        seeds, tasks: (1 + resamples, count) how often each is drawn.
    """

    values: Mapping[tuple[str, str], Floats]
    low: Floats
    high: Floats
    seeds: Floats
    tasks: Floats

    def recovered(self, arm: str, merge: str, *, here: bool = False) -> Floats:
        """Give (1 + resamples,) recovered of plain; the first is that of the data as they are. NaN where nothing was learned.

        Args:
            arm: Name.
            merge: Name of a merge, or "best".
            here: Whether to look at these very tasks, which are not drawn then.
        """
        tasks = np.ones_like(self.tasks) if here else self.tasks
        gained = self._mean(self.values[arm, merge] - self.low, tasks)  # over the floor, so that equal arms stay equal
        return recovered(gained, np.zeros_like(gained), self._mean(self.high - self.low, tasks))

    def scores(self, arm: str, merge: str) -> Floats:
        """Give (1 + tasks, 1 + resamples) merged scores: their mean over these very tasks, then each task's."""
        each = np.einsum("str,rs->tr", self.values[arm, merge], self.seeds) / self.seeds.sum(1)
        scores: Floats = np.concatenate([each.mean(0, keepdims=True), each])
        return scores

    def _mean(self, values: Floats, tasks: Floats) -> Floats:
        weighted: Floats = np.einsum("str,rs,rt->r", values, self.seeds, tasks)
        weighted /= self.seeds.sum(1) * tasks.sum(1)
        return weighted


def resample(
    layout: Layout, wanted: Mapping[tuple[str, str], Mapping[str, str]], count: int, *, stream: int = 0
) -> Resampled:
    """Draw seeds, tasks and examples with replacement: the same ones for two runs of the same rows, seeds and split.

    Args:
        layout: Layout of a finished run.
        wanted: (arm, label) -> half -> merge.
        count: Number of resamples.
        stream: Number of the stream of draws; another one is independent.
    """
    recipe, answers = layout.recipe, KeptAnswers(layout)
    split = recipe.evaluation.split_seed
    generator = np.random.default_rng([split, stream] if stream else split)
    tasks, seeds = list(layout.tasks), recipe.seeds
    weights = {(t, h): _drawn(generator, len(r), count) for t in tasks for h, r in answers.parts[t].halves.items()}

    def scores(units: Mapping[str, Unit], kind: str, task: str) -> Floats:  # mean of the halves, each of its unit
        halves = [answers.score(units[h], kind, task, h, weights[task, h]) for h in HALVES]
        return np.mean(halves, axis=0)  # type: ignore[no-any-return]

    def merged(arm: str, merges: Mapping[str, str], seed: int) -> dict[str, Unit]:
        choice = chosen(layout, recipe.arm(arm))
        return {h: Unit(MERGE, seed, arm, choice.rate, choice.step, merges[h], FOLDS) for h in HALVES}

    values = {
        key: np.array([[scores(merged(key[0], merges, s), "", t) for t in tasks] for s in seeds])
        for key, merges in wanted.items()
    }
    plain = {s: dict.fromkeys(HALVES, reference_unit(layout, s)) for s in seeds}
    low, high = (np.array([[scores(plain[s], kind, t) for t in tasks] for s in seeds]) for kind in ("floor", "alone"))
    return Resampled(values, low, high, _drawn(generator, len(seeds), count), _drawn(generator, len(tasks), count))


def _drawn(generator: np.random.Generator, n: int, count: int) -> Floats:
    """(1 + count, n): everything once, which gives the estimate itself, then how often each is drawn."""
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=count)
    return np.concatenate([np.ones((1, n)), drawn.astype(np.float64)])


@dataclass(frozen=True, slots=True)
class Spread:
    """How sure the scores of an arm under a merge are: seeds and examples are drawn, the tasks are these.

    Args:
        merged: Standard error of the merged score, points; None without resamples.
        recovered: Standard error of recovered of plain; None where it is not defined.
        tasks: Task -> 95 % interval of its merged score.
    """

    merged: float | None = None
    recovered: float | None = None
    tasks: Mapping[str, Interval | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inference:
    """What the resamples say.

    Args:
        comparisons: Primary endpoint ("best") first; p-values Holm-corrected within each merge.
        intervals: Arm -> 95 % interval of recovered under its own best merge, for arms that have all seeds; None where
            recovered is not defined.
        spreads: (arm, merge) -> how sure its scores are, for the merges that were resampled.
    """

    comparisons: Sequence[Comparison]
    intervals: Mapping[str, Interval | None]
    spreads: Mapping[tuple[str, str], Spread] = field(default_factory=dict)


def infer(layout: Layout, rows: Sequence[Row], against: str, merges: Sequence[str], count: int) -> Inference:
    """Resample every arm by itself, and against one, under each merge and under each arm's own best.

    Args:
        layout: Layout of a finished run.
        rows: Its rows.
        against: The arm the others are compared with.
        merges: Secondary endpoints.
        count: Number of resamples.

    Raises:
        UsageError: The arm `against` has no rows, or not of all seeds.
    """
    plain = [r for r in rows if not r.variant]
    full = set(layout.recipe.seeds)
    arms = [a for a in dict.fromkeys(r.arm for r in plain) if {r.seed for r in plain if r.arm == a} == full]
    if against not in arms:
        raise UsageError("the arm to compare with lacks seeds of the run", where=f"arm {against}")
    wanted = {(a, "best"): best_by_half(plain, a) for a in arms}
    wanted |= {(a, m): dict.fromkeys(HALVES, m) for a in arms for m in merges}
    drawn = resample(layout, wanted, count)
    comparisons: list[Comparison] = []
    for merge in ("best", *merges):
        comparisons += holm_corrected([comparison_of(drawn, against, a, merge) for a in arms if a != against])
    intervals = {a: _interval(drawn.recovered(a, "best")) for a in arms}
    return Inference(comparisons, intervals, {key: _spread(drawn, *key, list(layout.tasks)) for key in wanted})


def _usable(values: Floats) -> Floats:
    """Resamples in which something is defined."""
    resamples: Floats = values[1:]
    return resamples[np.isfinite(resamples)]


def _interval(values: Floats) -> Interval | None:
    """95 % interval of the resamples; None where the value itself, or most resamples, are not defined."""
    usable = _usable(values)
    if not len(usable) or not np.isfinite(values[0]) or len(usable) < len(values) / 2:
        return None
    low, high = np.quantile(usable, [0.025, 0.975])
    return float(low), float(high)


def _spread(drawn: Resampled, arm: str, merge: str, tasks: Sequence[str]) -> Spread:
    scores, shares = drawn.scores(arm, merge), drawn.recovered(arm, merge, here=True)
    intervals = {t: _interval(scores[1 + i]) for i, t in enumerate(tasks)}
    return Spread(_standard_error(scores[0]), _standard_error(shares), intervals)


def _standard_error(values: Floats) -> float | None:
    """Standard deviation over the resamples; None where the value itself, or most resamples, are not defined."""
    usable = _usable(values)
    return float(usable.std(ddof=1)) if _interval(values) and len(usable) > 1 else None


def comparison_of(drawn: Resampled, arm: str, other: str, merge: str) -> Comparison:
    """Compare what two arms keep under a merge, over the resamples, before any correction for several comparisons."""
    differences = drawn.recovered(arm, merge) - drawn.recovered(other, merge)
    center, values = float(differences[0]), _usable(differences)
    if not np.isfinite(center):
        return Comparison(arm, other, merge, undefined=NOTHING_LEARNED)
    if len(differences) == 1:
        return Comparison(arm, other, merge, center, undefined="nothing was resampled")
    if len(values) < len(differences) / 2:
        return Comparison(arm, other, merge, center, undefined=f"in most resamples, {NOTHING_LEARNED}")
    inner = np.quantile(values, [0.05, 0.95])
    here = drawn.recovered(arm, merge, here=True) - drawn.recovered(other, merge, here=True)
    low, high = _interval(differences) or (None, None)
    low_here, high_here = _interval(here) or (None, None)
    p = _two_sided(values)
    return Comparison(
        arm, other, merge, center, low, high, p, p,
        equivalent=bool(inner[0] > -MARGIN and inner[1] < MARGIN),
        detectable=_POWER * float(values.std(ddof=1)),
        low_here=low_here, high_here=high_here, p_here=None if low_here is None else _two_sided(_usable(here)),
    )  # fmt: skip


def _two_sided(values: Floats) -> float:
    """Two-sided p of a difference of zero, no smaller than the resamples can tell.

    >>> _two_sided(np.array([-1.0, 1.0, 2.0, 3.0]))
    0.5
    """
    tail = min(float((values <= 0).mean()), float((values >= 0).mean()))
    return min(1.0, 2 * max(tail, 1 / (len(values) + 1)))


def holm_corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct p-values for all comparisons that were asked for, those without an answer among them."""
    drawn, here = (_corrected(ps) for ps in ([c.p for c in comparisons], [c.p_here for c in comparisons]))
    return [replace(c, p_holm=p, p_here=h) for c, p, h in zip(comparisons, drawn, here, strict=True)]


def _corrected(ps: Sequence[float | None]) -> list[float | None]:
    """Correct p-values by Holm's step-down rule; None stays None and counts as a comparison.

    >>> _corrected([0.03, None, 0.01])
    [0.06, None, 0.03]
    """
    corrected: list[float | None] = [None] * len(ps)
    running = 0.0
    for place, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(ps) if p is not None)):
        running = max(running, min(1.0, p * (len(ps) - place)))
        corrected[i] = running
    return corrected
