"""Scores of one merge: a grid of scales that grows until it holds the answer, chosen on one half, reported on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.evaluation.evaluate import Evaluator, is_open, scored_labels
from plait.evaluation.splits import HALVES, Rows, Split, joined
from plait.model.stacked import Active
from plait.tasks import Task, primary, scores

Answers = npt.NDArray[Any]  # class ids (uint8, int16 or int32), float32 values, or the measured columns of open answers
STEP = math.sqrt(2.0)
_WIDEST = 6  # steps that a grid may grow by on either side


@dataclass(frozen=True, slots=True)
class Scorer:
    """Predicts and scores tasks with their heads.

    Args:
        evaluator: The loaded base.
        splits: Task -> its rows.
        heads: Task -> its head.
        together: All (adapter, scale) pairs in one pass over the rows, as suits a GPU; otherwise one after another.
    """

    evaluator: Evaluator
    splits: Mapping[str, Split]
    heads: Mapping[str, Mapping[str, Tensor]]
    together: bool = False

    def answers(self, task: str, active: Sequence[Active], rows: Rows) -> list[Answers]:
        """Class ids or values of each (adapter, scale) on these rows."""
        described, head = self.evaluator.tasks[task], self.heads[task]
        if self.together:
            from plait.evaluation.fleet import Candidate, predict_many

            logits = predict_many(self.evaluator, task, [Candidate(head, a, s) for a, s in active], rows)
        else:
            logits = [self.evaluator.predict(task, head, a, s, rows) for a, s in active]
        return [compact(one, described) for one in logits]

    def score(self, task: str, answers: Answers, rows: Rows) -> float:
        """The task's score in percent: the mean of its metrics."""
        labels = scored_labels(self.evaluator.tasks[task], self.evaluator.examples[task])[rows]
        return primary(scores(self.evaluator.tasks[task].metrics, answers, labels))


def compact(logits: npt.NDArray[np.float32], task: Task) -> Answers:
    """What is kept of logits: the class with the largest, the value, or all that was measured of an open answer."""
    if is_open(task):
        return logits
    if task.kind == "regression":
        return logits.reshape(-1).astype(np.float32)
    kind = next(k for k in (np.uint8, np.int16, np.int32) if logits.shape[1] - 1 <= np.iinfo(k).max)
    classes: Answers = logits.argmax(-1).astype(kind)
    return classes


@dataclass(frozen=True, slots=True)
class GridRow:
    """One scale on one part of the rows: task -> score."""

    scale: float
    part: str
    tasks: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class HalfScore:
    """A merge at the scale that was chosen on one half, reported on the other.

    Args:
        scale: The choice.
        selected: Its mean score on the grid rows of the half it was chosen on.
        score: Task -> score on all rows of the half that is reported.
        regret_half, regret_double: Points lost at half and twice the scale, on this half's grid rows; None off the grid.
        edge: Whether the scale lies on the edge of its grid.
    """

    scale: float
    selected: float
    score: Mapping[str, float]
    regret_half: float | None
    regret_double: float | None
    edge: bool


@dataclass(frozen=True, slots=True)
class CrossFitted:
    """The grid, and each half that is reported."""

    grid: tuple[GridRow, ...]
    halves: Mapping[str, HalfScore]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The grid on the tuning rows, its best scale and that one's mean score."""

    grid: tuple[GridRow, ...]
    scale: float
    score: float


@dataclass
class Grid:
    """Scores on the rows that scales are chosen from: (scale, part) -> task -> score.

    Args:
        scorer: Scorer of the tasks.
        adapter: The merged one.
        parts: Name -> task -> rows.
        answers: (scale, part, task) -> what was answered on the part's rows.
    """

    scorer: Scorer
    adapter: Adapter
    parts: Mapping[str, Mapping[str, Rows]]
    scores: dict[tuple[float, str], dict[str, float]] = field(default_factory=dict)
    answers: dict[tuple[float, str, str], Answers] = field(default_factory=dict)

    def add(self, scales: Sequence[float]) -> None:
        """Score scales that are not there yet, all of them in one pass over a task's rows."""
        new = [s for s in dict.fromkeys(scales) if (s, next(iter(self.parts))) not in self.scores]
        for task in self.scorer.splits if new else ():
            rows, places = joined([part[task] for part in self.parts.values()])
            for scale, answers in zip(
                new, self.scorer.answers(task, [(self.adapter, s) for s in new], rows), strict=True
            ):
                for name, place in zip(self.parts, places, strict=True):
                    value = self.scorer.score(task, answers[place], rows[place])
                    self.scores.setdefault((scale, name), {})[task] = value
                    self.answers[scale, name, task] = answers[place]

    def mean(self, scale: float, part: str) -> float:
        """Mean over tasks."""
        return float(np.mean(list(self.scores[scale, part].values())))

    def best(self, part: str) -> float:
        """The scale with the highest mean on a part; the smallest of equals."""
        return max(sorted(s for s, p in self.scores if p == part), key=lambda s: self.mean(s, part))

    def rows(self) -> tuple[GridRow, ...]:
        """Give everything as a table."""
        return tuple(GridRow(s, p, tasks) for (s, p), tasks in sorted(self.scores.items()))


def ladder(start: Sequence[float]) -> list[float]:
    """Scales from the smallest given to the largest, each sqrt(2) times the last."""
    first, last = min(start), max(start)
    return [first * STEP**i for i in range(round(math.log(last / first, STEP)) + 1)]


def grown(grid: Grid, start: Sequence[float]) -> None:
    """Score a grid of scales, each sqrt(2) times the last, and grow it until no part's best lies on its edge.

    Half and twice every best scale are scored too, for the regret. Growth ends after a factor of 8 on either side: a
    method that is best with no update at all has no inner optimum, and `edge` in the result says so.
    """
    count = len(ladder(start)) - 1
    rungs = {i: min(start) * STEP**i for i in range(-_WIDEST, count + _WIDEST + 1)}
    number = {scale: i for i, scale in rungs.items()}
    known = set(range(count + 1))
    while True:
        grid.add([rungs[i] for i in sorted(known)])
        wanted = set(known)
        for part in grid.parts:
            best = number[grid.best(part)]
            wanted |= {i for i in (best - 2, best - 1, best + 1, best + 2) if i in rungs}
        if wanted == known:
            return
        known = wanted


def cross_fitted(
    scorer: Scorer, adapter: Adapter, start: Sequence[float], *, grow: bool = True
) -> tuple[CrossFitted, dict[str, Answers]]:
    """Choose the scale on each half, report on the other.

    Args:
        scorer: What scores.
        adapter: The merge.
        start: Scales, ascending.
        grow: Whether to fill the grid and let it grow until the best scale lies inside; else exactly these scales are tried.

    Returns:
        The grid and the halves; and "task.half" -> answers on the reported rows.
    """
    grid = Grid(scorer, adapter, {h: {t: s.grid[h] for t, s in scorer.splits.items()} for h in HALVES})
    if grow:
        grown(grid, start)
    else:
        grid.add(start)
    answers: dict[str, Answers] = {}
    halves = {}
    scales = {reported: grid.best(chosen_on) for chosen_on, reported in zip(HALVES, reversed(HALVES), strict=True)}
    for task, split in scorer.splits.items():
        answers |= {f"{task}.{h}": a for h, a in _reported(grid, task, split, scales).items()}
    for chosen_on, reported in zip(HALVES, reversed(HALVES), strict=True):
        scale = scales[reported]
        score = {t: scorer.score(t, answers[f"{t}.{reported}"], s.halves[reported]) for t, s in scorer.splits.items()}
        tried = sorted(s for s, p in grid.scores if p == reported)
        halves[reported] = HalfScore(
            scale=scale,
            selected=grid.mean(scale, chosen_on),
            score=score,
            regret_half=_regret(grid, tried, scale, 0.5, reported),
            regret_double=_regret(grid, tried, scale, 2.0, reported),
            edge=len(tried) > 1 and scale in (tried[0], tried[-1]),
        )
    return CrossFitted(grid.rows(), halves), answers


def _reported(grid: Grid, task: str, split: Split, scales: Mapping[str, float]) -> dict[str, Answers]:
    """Answers on each half at its scale: the grid's where it was of all rows, else in one pass where the scale is the same."""
    scorer, adapter = grid.scorer, grid.adapter
    if all(len(split.grid[h]) == len(split.halves[h]) for h in scales):
        return {h: grid.answers[s, h, task] for h, s in scales.items()}
    if len(set(scales.values())) > 1:
        return {h: scorer.answers(task, [(adapter, s)], split.halves[h])[0] for h, s in scales.items()}
    rows, places = joined([split.halves[h] for h in scales])
    answers = scorer.answers(task, [(adapter, next(iter(scales.values())))], rows)[0]
    return {h: answers[place] for h, place in zip(scales, places, strict=True)}


def _regret(grid: Grid, tried: Sequence[float], scale: float, factor: float, part: str) -> float | None:
    """Points lost at a multiple of the scale; None where the grid has no such scale."""
    nearest = min(tried, key=lambda s: abs(math.log(s / (scale * factor))))
    if abs(math.log(nearest / (scale * factor))) >= 0.01:
        return None
    return grid.mean(scale, part) - grid.mean(nearest, part)


def tuned(scorer: Scorer, adapter: Adapter, start: Sequence[float]) -> Tuned:
    """Choose the best scale on the tuning rows, from the grid as it starts."""
    grid = Grid(scorer, adapter, {"tuning": {t: s.tuning for t, s in scorer.splits.items()}})
    grid.add(ladder(start))
    scale = grid.best("tuning")
    return Tuned(grid.rows(), scale, grid.mean(scale, "tuning"))
