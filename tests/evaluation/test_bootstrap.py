"""The bootstrap's vectorised metrics are the metrics, for any weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import UsageError
from plait.evaluation.bootstrap import Resamples, weighted_score
from plait.evaluation.evaluate import halves
from plait.tasks.metrics import CLASS_METRICS, VALUE_METRICS, score

SEEDS = st.integers(0, 10_000)


def sample(seed: int, classes: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels] * rng.integers(0, 2), labels


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("metric", CLASS_METRICS)
@given(seed=SEEDS, classes=st.integers(2, 5), n=st.integers(1, 20))
def test_weights_of_one_give_the_metric(metric, seed, classes, n):
    logits, labels = sample(seed, classes, n)
    found = weighted_score((metric,), logits, labels, np.ones((1, n)))
    assert found[0] == pytest.approx(score(metric, logits, labels), abs=1e-9)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("metric", CLASS_METRICS)
def test_a_half_of_one_class_that_everybody_answers(metric):
    answers, labels = np.zeros(3, np.uint8), np.zeros(3, np.int64)
    found = weighted_score((metric,), np.eye(1)[answers], labels, np.ones((1, 3)))  # as kept answers are scored again
    assert found[0] == pytest.approx(score(metric, answers, labels), abs=1e-9)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("metric", [*CLASS_METRICS, "pearson"])
@given(seed=SEEDS, n=st.integers(4, 20))
def test_whole_weights_are_repeated_rows(metric, seed, n):
    logits, labels = sample(seed, 3 if metric != "pearson" else 1, n)
    targets = labels if metric != "pearson" else np.random.default_rng(seed + 1).normal(size=n)
    weights = np.random.default_rng(seed).integers(0, 3, (1, n))
    if np.count_nonzero(weights) < 3:
        return
    repeated = np.repeat(np.arange(n), weights[0])
    expected = score(metric, logits[repeated], targets[repeated])
    assert weighted_score((metric,), logits, targets, weights.astype(float))[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", VALUE_METRICS)
@given(seed=SEEDS, n=st.integers(3, 30))
def test_what_is_constant_among_the_rows_that_are_drawn_correlates_with_nothing(metric, seed, n):
    rng = np.random.default_rng(seed)
    x, y = np.round(rng.normal(size=(n, 1)), 1), np.round(rng.normal(size=n), 1)
    x[: n // 2] = x[0]
    weights = np.zeros((2, n))
    weights[0, rng.integers(n)] = n  # one row alone
    weights[1, : max(1, n // 2)] = 1 + rng.integers(0, 3, max(1, n // 2))  # rows of one prediction
    if np.ptp(x):
        assert weighted_score((metric,), x, y, weights).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("metric", VALUE_METRICS)
def test_values(metric):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 1)), rng.integers(0, 5, 30).astype(float)
    assert weighted_score((metric,), x, y, np.ones((2, 30))) == pytest.approx(score(metric, x, y))
    assert weighted_score((metric,), np.full((30, 1), 0.3), y, np.ones((1, 30)))[0] == 0.0
    assert weighted_score((metric,), x, np.full(30, 2.0), np.ones((1, 30)))[0] == 0.0


def test_a_score_is_the_mean_of_its_metrics_and_others_are_refused():
    logits, labels = sample(3, 2, 40)
    both = weighted_score(("accuracy", "f1"), logits, labels, np.ones((1, 40)))[0]
    assert both == pytest.approx((score("accuracy", logits, labels) + score("f1", logits, labels)) / 2)
    with pytest.raises(UsageError, match="no bootstrap"):
        weighted_score(("exact",), logits, labels, np.ones((1, 40)))


def test_draws_are_paired_repeatable_and_unbiased():
    one, two = (Resamples.draw({"a": 50, "b": 7}, 300, seed=1) for _ in range(2))
    assert all(np.array_equal(one.counts[t], two.counts[t]) for t in "ab")
    assert np.array_equal(one.counts["a"].sum(1), np.full(300, 50)) and one.counts["b"].shape == (300, 7)
    assert abs(one.counts["a"].mean(0) - 1).max() < 0.4
    logits, labels = sample(5, 2, 50)
    spread = weighted_score(("accuracy",), logits, labels, one.counts["a"]).std()
    p = score("accuracy", logits, labels) / 100
    assert spread == pytest.approx(100 * np.sqrt(p * (1 - p) / 50), rel=0.25)


@given(st.integers(0, 300), st.integers(0, 50))
def test_halves_are_a_partition(n, seed):
    found = halves(n, seed)
    assert sorted([*found["selection"], *found["reported"]]) == list(range(n))
    assert len(found["selection"]) == n // 2 and list(found["selection"]) == sorted(found["selection"])
    assert all(np.array_equal(found[k], halves(n, seed)[k]) for k in found)
