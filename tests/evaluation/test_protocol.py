"""A grid of scales, a choice on one half, a report on the other: against scores that are known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from plait.evaluation.protocol import compact, cross_fitted, ladder
from plait.evaluation.splits import split_rows
from plait.tasks import Source, Task

BY_SCALE = {0.25: 20.0, 0.5: 60.0, 1.0: 80.0, 2.0: 50.0, 4.0: 10.0}


@dataclass
class Known:
    """A scorer whose answers are the scale itself, and whose score of a scale is written above."""

    splits: dict = field(default_factory=lambda: {"t": split_rows(40, seed=0, tuning_rows=0, grid_rows=7)})

    def answers(self, task, each, rows):
        return [np.full(len(rows), scale) for _, scale in each]

    def score(self, task, answers, rows):
        assert len(answers) == len(rows)
        return BY_SCALE[float(answers[0])]


@pytest.mark.parametrize(
    ("scales", "half", "double", "edge"),
    [
        ([0.5, 1.0, 2.0], 20.0, 30.0, False),
        ([0.25, 0.5, 1.0, 4.0], 20.0, None, False),
        ([0.25, 1.0], None, None, True),
        ([1.0], None, None, False),
    ],
)
def test_what_half_and_twice_the_scale_lose(scales, half, double, edge):
    fitted, answers = cross_fitted(Known(), None, scales, grow=False)
    assert {h: len(a) for h, a in answers.items()} == {"t.A": 20, "t.B": 20}
    for reported in fitted.halves.values():
        assert (reported.scale, reported.selected, reported.score) == (1.0, 80.0, {"t": 80.0})
        assert (reported.regret_half, reported.regret_double, reported.edge) == (half, double, edge)
    assert {(r.scale, r.part): r.tasks["t"] for r in fitted.grid} == {(s, h): BY_SCALE[s] for s in scales for h in "AB"}


def test_a_grid_goes_from_its_ends_by_the_square_root_of_two():
    assert ladder([2.0, 0.5]) == pytest.approx([0.5, 0.5**0.5, 1.0, 2**0.5, 2.0])


@pytest.mark.parametrize("classes", [2, 256, 257, 32_768, 32_769, 70_000])
def test_the_class_that_is_kept_of_logits_is_the_largest(classes):
    task = Task("t", "classification", Source("none"), ("text",), labels=tuple(map(str, range(classes))))
    logits = np.zeros((2, classes), np.float32)
    logits[0, 1], logits[1, classes - 1] = 1, 1
    assert compact(logits, task).tolist() == [1, classes - 1]
