"""Metrics as scikit-learn, scipy and GLUE define them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from plait.errors import RunError, UsageError
from plait.tasks import GLUE_TASKS, glue_task
from plait.tasks.metrics import METRICS, METRICS_OF, primary, score, scores

CLASSES = st.integers(2, 4).flatmap(
    lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=30)
)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(CLASSES)
def test_class_metrics(pairs):
    said, true = np.array(pairs).T
    logits = np.eye(4)[said]
    assert score("accuracy", logits, true) == pytest.approx(100 * sk.accuracy_score(true, said))
    assert score("matthews", logits, true) == pytest.approx(100 * sk.matthews_corrcoef(true, said))
    assert score("f1_macro", logits, true) == pytest.approx(
        100 * sk.f1_score(true, said, average="macro", zero_division=0)
    )
    positive = 100 * sk.f1_score(true == 1, said == 1, zero_division=0)
    assert score("f1", logits, true) == pytest.approx(positive) == pytest.approx(score("f1", said, true))


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 5)), min_size=3, max_size=30))
def test_value_metrics(pairs):
    x, y = np.array(pairs).T
    found = {m: score(m, x[:, None], y) for m in METRICS_OF["regression"]}
    if np.ptp(y) == 0 or np.ptp(x) <= 1e-12 * max(1.0, np.abs(x).max()):
        assert found == {"pearson": 0.0, "spearman": 0.0}
        return
    if np.ptp(x) > 1e-3:  # below, scipy warns that its own result is not to be trusted
        assert found["pearson"] == pytest.approx(100 * stats.pearsonr(x, y).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(x, y).statistic, abs=1e-6)


def test_exact_match_and_the_score_of_a_task():
    assert score("exact_match", [" yes ", "no"], ["yes", "yes"]) == 50.0
    assert primary(scores(("accuracy", "f1"), np.array([1, 1, 0]), np.array([1, 0, 0]))) == pytest.approx(
        (200 / 3 + 200 / 3) / 2
    )
    assert score("pearson", np.array([0.5]), np.array([1.0])) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", [m for m in METRICS if m != "exact_match"])
def test_predictions_that_are_no_numbers(metric, value):
    with pytest.raises(RunError, match="1 prediction is NaN or infinite"):
        score(metric, np.array([[0.0], [value]]), np.array([0, 1]))


def test_wrong_calls():
    with pytest.raises(UsageError, match="unknown metric"):
        score("bleu", np.zeros(1), np.zeros(1))
    for predictions, labels in ((np.zeros(2), np.zeros(3)), (np.zeros(0), np.zeros(0))):
        with pytest.raises(RunError, match="predictions for"):
            score("accuracy", predictions, labels)


def test_glue_is_scored_as_its_paper_says():
    found = {name: glue_task(name).metrics for name in GLUE_TASKS}
    assert found["cola"] == ("matthews",) and found["stsb"] == ("pearson", "spearman")
    assert found["mrpc"] == found["qqp"] == ("accuracy", "f1")
    assert all(found[n] == ("accuracy",) for n in ("sst2", "mnli", "qnli", "rte"))
    assert glue_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert "validation_matched" in glue_task("mnli").source.validation
