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
from plait.tasks import Task, primary, scores

Answers = npt.NDArray[Any]  # class ids (uint8 or int16), float32 values, or the measured columns of open answers
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

    def answers(self, task: str, worn: Sequence[tuple[Adapter | None, float]], rows: Rows) -> list[Answers]:
        """Class ids or values of each (adapter, scale) on these rows."""
        found, head = self.evaluator.tasks[task], self.heads[task]
        if self.together:
            from plait.evaluation.fleet import Candidate, predict_many

            logits = predict_many(self.evaluator, task, [Candidate(head, a, s) for a, s in worn], rows)
        else:
            logits = [self.evaluator.predict(task, head, a, s, rows) for a, s in worn]
        return [compact(one, found) for one in logits]

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
    classes: Answers = logits.argmax(-1).astype(np.uint8 if logits.shape[1] <= 256 else np.int16)
    return classes


@dataclass
class Grid:
    """Scores on the rows that scales are chosen from: (scale, part) -> task -> score.

    Args:
        scorer: Scorer of the tasks.
        adapter: The merged one.
        parts: Name -> task -> rows.
    """

    scorer: Scorer
    adapter: Adapter
    parts: Mapping[str, Mapping[str, Rows]]
    found: dict[tuple[float, str], dict[str, float]] = field(default_factory=dict)

    def add(self, scales: Sequence[float]) -> None:
        """Score scales that are not there yet, all of them in one pass over a task's rows."""
        new = [s for s in dict.fromkeys(scales) if (s, next(iter(self.parts))) not in self.found]
        for task in self.scorer.splits if new else ():
            rows, places = joined([part[task] for part in self.parts.values()])
            for scale, answers in zip(
                new, self.scorer.answers(task, [(self.adapter, s) for s in new], rows), strict=True
            ):
                for name, place in zip(self.parts, places, strict=True):
                    value = self.scorer.score(task, answers[place], rows[place])
                    self.found.setdefault((scale, name), {})[task] = value

    def mean(self, scale: float, part: str) -> float:
        """Mean over tasks."""
        return float(np.mean(list(self.found[scale, part].values())))

    def best(self, part: str) -> float:
        """The scale with the highest mean on a part; the smallest of equals."""
        return max(sorted(s for s, p in self.found if p == part), key=lambda s: self.mean(s, part))

    def rows(self) -> list[dict[str, Any]]:
        """Everything, as a table."""
        return [{"scale": s, "part": p, "tasks": tasks} for (s, p), tasks in sorted(self.found.items())]


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
) -> tuple[dict[str, Any], dict[str, Answers]]:
    """Choose the scale on each half, report on the other.

    Args:
        scorer: What scores.
        adapter: The merge.
        start: Scales, ascending.
        grow: Whether to fill the grid and let it grow until the best scale lies inside; else exactly these scales are tried.

    Returns:
        JSON: `grid`, and for each half that is reported: scale, score of the choice (`selected`), `score` by task on all
        of its rows, `regret_half`, `regret_double` (points lost at half and twice the scale, on its grid rows), `edge`.
        And "task.half" -> answers on the reported rows.
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
        answers |= {f"{task}.{h}": a for h, a in _reported(scorer, adapter, task, split, scales).items()}
    for chosen_on, reported in zip(HALVES, reversed(HALVES), strict=True):
        scale = scales[reported]
        found = {t: scorer.score(t, answers[f"{t}.{reported}"], s.halves[reported]) for t, s in scorer.splits.items()}
        halves[reported] = {
            "scale": scale,
            "selected": grid.mean(scale, chosen_on),
            "score": found,
            **_regret(grid, scale, reported),
        }
    return {"grid": grid.rows(), "halves": halves}, answers


def _reported(
    scorer: Scorer, adapter: Adapter, task: str, split: Split, scales: Mapping[str, float]
) -> dict[str, Answers]:
    """Answers on each half at its scale; in one pass over both halves where the scale is the same."""
    if len(set(scales.values())) > 1:
        return {h: scorer.answers(task, [(adapter, s)], split.halves[h])[0] for h, s in scales.items()}
    rows, places = joined([split.halves[h] for h in scales])
    answers = scorer.answers(task, [(adapter, next(iter(scales.values())))], rows)[0]
    return {h: answers[place] for h, place in zip(scales, places, strict=True)}


def _regret(grid: Grid, scale: float, part: str) -> dict[str, Any]:
    scales = sorted(s for s, p in grid.found if p == part)
    near = {name: _nearest(scales, scale * by) for name, by in (("regret_half", 0.5), ("regret_double", 2.0))}
    lost = {name: None if s is None else grid.mean(scale, part) - grid.mean(s, part) for name, s in near.items()}
    return {**lost, "edge": len(scales) > 1 and scale in (scales[0], scales[-1])}


def _nearest(scales: Sequence[float], wanted: float) -> float | None:
    found = min(scales, key=lambda s: abs(math.log(s / wanted)))
    return found if abs(math.log(found / wanted)) < 0.01 else None


def tuned(scorer: Scorer, adapter: Adapter, start: Sequence[float]) -> dict[str, Any]:
    """The best scale on the tuning rows and its score, from the grid as it starts."""
    grid = Grid(scorer, adapter, {"tuning": {t: s.tuning for t, s in scorer.splits.items()}})
    grid.add(ladder(start))
    scale = grid.best("tuning")
    return {"grid": grid.rows(), "scale": scale, "score": grid.mean(scale, "tuning")}
