"""How sure differences between arms are: a bootstrap paired over seeds, tasks and examples, Holm, and equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.adapters.tensors import read_tensors
from plait.errors import InputError, UsageError
from plait.evaluation.bootstrap import Floats, weighted_score
from plait.evaluation.evaluate import is_open
from plait.evaluation.splits import HALVES, Split
from plait.report.table import LEARNED, Row, best_by_half, reference_unit
from plait.runs.inputs import INPUTS_FILE
from plait.runs.layout import Layout
from plait.runs.stages import ANSWERS_FILE, splits
from plait.runs.units import FOLDS, MERGE, Unit
from plait.runs.waves import chosen

NOTHING_LEARNED = f"adapters alone do not beat the floor by {LEARNED:g} point: there is no gain to recover a share of"
MARGIN = 0.05  # of recovered: arms nearer than that are called equivalent
_POWER = 2.80  # standard errors of a difference that a two-sided 5 % test finds with power 0.8


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another under one merge (or each under its own best).

    Args:
        arm, other, merge: Which; merge "best" is each arm's own.
        difference: Mean recovered of `arm` minus that of `other`.
        low, high: 95 % interval.
        p: Two-sided.
        p_holm: Corrected for all comparisons of one merge.
        equivalent: Two one-sided tests at 5 % put the difference within `MARGIN`.
        detectable: Smallest difference found with power 0.8.
        low_here, high_here, p_here: The same of these very tasks, which are not drawn then: seeds and examples alone;
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


@dataclass(slots=True)
class Resampled:
    """Recovered of arms and merges in every resample, all from the same draws of seeds, tasks and examples.

    Args:
        values: (arm, merge) -> (seeds, tasks, 1 + resamples) score of resampled examples, percent; the first as they are.
        low, high: (seeds, tasks, 1 + resamples) of the floor and of the plain reference.
        seeds, tasks: (1 + resamples, count) how often each is drawn.
    """

    values: dict[tuple[str, str], Floats]
    low: Floats
    high: Floats
    seeds: Floats
    tasks: Floats

    def recovered(self, arm: str, merge: str, *, here: bool = False) -> Floats:
        """(1 + resamples,) recovered; the first is that of the data as they are. NaN where nothing was learned.

        Args:
            arm: Which.
            merge: Under which, or "best".
            here: Of these very tasks: they are not drawn.
        """
        tasks = np.ones_like(self.tasks) if here else self.tasks
        gain = self._mean(self.high - self.low, tasks)
        return self._mean(self.values[arm, merge] - self.low, tasks) / np.where(gain > LEARNED, gain, np.nan)

    def _mean(self, values: Floats, tasks: Floats) -> Floats:
        weighted = np.einsum("str,rs,rt->r", values, self.seeds, tasks)
        found: Floats = weighted / (self.seeds.sum(1) * tasks.sum(1))
        return found


def resample(layout: Layout, wanted: Mapping[tuple[str, str], Mapping[str, str]], count: int) -> Resampled:
    """Draw seeds, tasks and examples with replacement.

    Args:
        layout: Of a finished study.
        wanted: (arm, label) -> half -> merge.
        count: Resamples.
    """
    study, parts = layout.study, splits(layout)
    generator = np.random.default_rng(study.evaluation.split_seed)
    tasks, seeds = list(layout.tasks), study.seeds
    weights = {(t, h): _drawn(generator, len(r), count) for t in tasks for h, r in parts[t].halves.items()}
    one = _Weighted(layout, parts, weights)
    values = {
        key: np.array([[one.merged(key[0], merges, s, t) for t in tasks] for s in seeds])
        for key, merges in wanted.items()
    }
    low, high = (np.array([[one.plain(kind, s, t) for t in tasks] for s in seeds]) for kind in ("floor", "alone"))
    return Resampled(values, low, high, _drawn(generator, len(seeds), count), _drawn(generator, len(tasks), count))


def _drawn(generator: np.random.Generator, n: int, count: int) -> Floats:
    """(1 + count, n): everything once, which gives the estimate itself, then how often each is drawn."""
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=count)
    return np.concatenate([np.ones((1, n)), drawn.astype(np.float64)])


class _Weighted:
    """Scores of kept answers under many weightings of the examples."""

    def __init__(self, layout: Layout, parts: Mapping[str, Split], weights: Mapping[tuple[str, str], Floats]) -> None:
        self.layout, self.parts, self.weights = layout, parts, weights
        self.read: dict[Any, dict[str, npt.NDArray[Any]]] = {}

    def merged(self, arm: str, merges: Mapping[str, str], seed: int, task: str) -> Floats:
        """(resamples,) mean of the two halves, each under its merge."""
        choice = chosen(self.layout, self.layout.study.arm(arm))
        units = {h: Unit(MERGE, seed, arm, choice.rate, choice.step, merges[h], FOLDS) for h in HALVES}
        return np.mean([self._score(self._answers(units[h])[f"{task}.{h}"], task, h) for h in HALVES], axis=0)  # type: ignore[no-any-return]

    def plain(self, kind: str, seed: int, task: str) -> Floats:
        """(resamples,) of the plain reference alone, or of its floor."""
        answers = self._answers(reference_unit(self.layout, seed))
        return np.mean([self._score(answers[f"{kind}.{task}.{h}"], task, h) for h in HALVES], axis=0)  # type: ignore[no-any-return]

    def _answers(self, unit: Unit) -> dict[str, npt.NDArray[Any]]:
        if unit not in self.read:
            tensors, _, _ = read_tensors(self.layout.path(unit) / ANSWERS_FILE)
            self.read[unit] = {k: v.numpy() for k, v in tensors.items()}
        return self.read[unit]

    def _score(self, answers: npt.NDArray[Any], task: str, half: str) -> Floats:
        found = self.layout.tasks[task]
        labels = self.layout.labels(task)[self.parts[task].halves[half]]
        if len(answers) != len(labels):
            raise InputError(
                f"task {task!r}: {len(labels)} labels of a half whose answers are {len(answers)}",
                where=str(self.layout.out / INPUTS_FILE if self.layout.recorded else self.layout.out),
                hint="restore the study's folder as it was written",
            )
        if found.kind != "regression" and not is_open(
            found
        ):  # what was kept is the class; the metrics take scores of classes
            answers = np.eye(max(int(answers.max()), int(labels.max())) + 1)[answers]
        return weighted_score(found.metrics, answers, labels, self.weights[task, half])


@dataclass(frozen=True, slots=True)
class Inference:
    """What the resamples say.

    Args:
        comparisons: Primary endpoint ("best") first; p-values Holm-corrected within each merge.
        intervals: Arm -> 95 % interval of recovered under its own best merge, for arms that have all seeds; None where
            recovered is not defined.
    """

    comparisons: list[Comparison]
    intervals: dict[str, tuple[float, float] | None]


def infer(layout: Layout, rows: Sequence[Row], against: str, merges: Sequence[str], count: int) -> Inference:
    """Every arm by itself, and against one, under each merge and under each arm's own best.

    Args:
        layout: Of a finished study.
        rows: Its rows.
        against: The arm the others are compared with.
        merges: Secondary endpoints.
        count: Resamples.

    Raises:
        UsageError: The arm `against` has no rows, or not of all seeds.
    """
    plain = [r for r in rows if not r.variant]
    full = set(layout.study.seeds)
    arms = [a for a in dict.fromkeys(r.arm for r in plain) if {r.seed for r in plain if r.arm == a} == full]
    if against not in arms:
        raise UsageError("the arm to compare with lacks seeds of the study", where=f"arm {against}")
    wanted = {(a, "best"): best_by_half(plain, a) for a in arms}
    wanted |= {(a, m): dict.fromkeys(HALVES, m) for a in arms for m in merges}
    drawn = resample(layout, wanted, count)
    found = []
    for merge in ("best", *merges):
        one = [_compared(drawn, against, a, merge) for a in arms if a != against]
        found += _holm(one)
    return Inference(found, {a: _interval(drawn.recovered(a, "best")) for a in arms})


def _interval(found: Floats) -> tuple[float, float] | None:
    values = found[1:][np.isfinite(found[1:])]
    if not np.isfinite(found[0]) or len(values) < len(found) / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _compared(drawn: Resampled, arm: str, other: str, merge: str) -> Comparison:
    found = drawn.recovered(arm, merge) - drawn.recovered(other, merge)
    center, values = float(found[0]), found[1:][np.isfinite(found[1:])]
    if not np.isfinite(center):
        return Comparison(arm, other, merge, undefined=NOTHING_LEARNED)
    if len(values) < len(found) / 2:
        return Comparison(arm, other, merge, center, undefined=f"in most resamples, {NOTHING_LEARNED}")
    p, inner = _two_sided(values), np.quantile(values, [0.05, 0.95])
    here = drawn.recovered(arm, merge, here=True) - drawn.recovered(other, merge, here=True)
    kept = here[1:][np.isfinite(here[1:])]
    low, high = _interval(found) or (None, None)
    low_here, high_here = _interval(here) or (None, None)
    return Comparison(
        arm, other, merge, center, low, high, p, p,
        equivalent=bool(inner[0] > -MARGIN and inner[1] < MARGIN),
        detectable=_POWER * float(values.std(ddof=1)),
        low_here=low_here, high_here=high_here, p_here=None if low_here is None else _two_sided(kept),
    )  # fmt: skip


def _two_sided(values: Floats) -> float:
    tail = min(float((values <= 0).mean()), float((values >= 0).mean()))
    return min(1.0, 2 * max(tail, 1 / (len(values) + 1)))


def _holm(found: Sequence[Comparison]) -> list[Comparison]:
    """Corrected for all comparisons that were asked for, those without an answer among them."""
    drawn, here = (_corrected(ps) for ps in ([c.p for c in found], [c.p_here for c in found]))
    return [replace(c, p_holm=p, p_here=h) for c, p, h in zip(found, drawn, here, strict=True)]


def _corrected(ps: Sequence[float | None]) -> list[float | None]:
    corrected: list[float | None] = [None] * len(ps)
    running = 0.0
    for place, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(ps) if p is not None)):
        running = max(running, min(1.0, p * (len(ps) - place)))
        corrected[i] = running
    return corrected
