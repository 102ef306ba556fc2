"""How sure differences between arms are, against arithmetic by hand: no study is run."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from plait.report.inference import NOTHING_LEARNED, Comparison, Resampled, comparison_of, holm_corrected


def drawn(high):
    """One seed, one task, 100 resamples: arm a at 60, b at 50, the floor at 40, adapters alone as given."""
    line = {"a": 60.0, "b": 50.0}
    values = {(k, "best"): np.full((1, 1, 101), v) for k, v in line.items()}
    return Resampled(
        values, np.full((1, 1, 101), 40.0), np.array(high)[None, None], np.ones((101, 1)), np.ones((101, 1))
    )


def test_comparisons_without_an_answer_have_none_and_say_why():
    never = comparison_of(drawn([40.5] * 101), "a", "b", "best")
    seldom = comparison_of(drawn([50.0] + [40.0] * 60 + [50.0] * 40), "a", "b", "best")
    always = comparison_of(drawn([80.0] * 101), "a", "b", "best")
    assert (never.difference, never.p, never.undefined) == (None, None, NOTHING_LEARNED)
    assert seldom.difference == pytest.approx(1.0) and seldom.p is None and "most resamples" in seldom.undefined
    assert always.difference == pytest.approx(0.25) and always.undefined == "" and always.p == pytest.approx(2 / 101)
    corrected = holm_corrected([Comparison("a", "b", "m", p=0.03), never, Comparison("a", "c", "m", p=0.01)])
    assert [c.p_holm for c in corrected] == [pytest.approx(0.06), None, pytest.approx(0.03)]


def test_what_holds_of_these_tasks_is_surer_than_what_holds_of_tasks_drawn_like_them():
    """Two tasks, differences of 10 and 30 points with no other noise: drawn, 10 to 30; these two, 20 exactly."""
    tasks = np.array([[1.0, 1.0]] + [[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [1.0, 1.0]] * 25)
    better, worse = (np.stack([np.full(101, x) for x in pair])[None] for pair in ((60.0, 80.0), (50.0, 50.0)))
    low, high = (np.full((1, 2, 101), x) for x in (0.0, 100.0))
    both = Resampled({("a", "best"): better, ("b", "best"): worse}, low, high, np.ones((101, 1)), tasks)
    found = comparison_of(both, "a", "b", "best")
    assert (found.difference, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
    assert (found.low_here, found.high_here, found.p_here) == pytest.approx((0.2, 0.2, 2 / 101))
    # 25 resamples at 0.1, 50 at 0.2, 25 at 0.3; a two-sided test at 5 % that misses one difference in five.
    spread = math.sqrt((25 * 0.1**2 + 25 * 0.1**2) / 99)
    assert found.detectable == pytest.approx(
        (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) * spread, rel=1e-3
    )
    level = holm_corrected([found, Comparison("a", "c", "best", p=0.9, p_here=0.03)])
    assert [c.p_here for c in level] == [pytest.approx(4 / 101), pytest.approx(4 / 101)]
