"""Scores of predictions, in percent, from scikit-learn and scipy."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.border.counts import plural
from plait.errors import RunError, UsageError
from plait.tasks.task import SLOT_METRICS

CLASS_METRICS = ("accuracy", "f1", "f1_macro", "matthews")
VALUE_METRICS = ("pearson", "spearman")
TEXT_METRICS = ("exact_match", "rouge_l", "likelihood", *SLOT_METRICS)
OPEN = (
    -1
)  # the label of a row whose answer is open; its prediction is then what was measured of the model's own answer:
MEASURED = ("exact match", "ROUGE-L", "log-likelihood", "tokens")
OF_SLOTS = ("right slots", "slots said and asked", "right intent")  # columns that follow where a metric is one of slots
METRICS = CLASS_METRICS + VALUE_METRICS + TEXT_METRICS
METRICS_OF = {
    "classification": CLASS_METRICS,
    "regression": VALUE_METRICS,
    "causal": TEXT_METRICS,
    "seq2seq": TEXT_METRICS,
}


def score(
    metric: str, predictions: npt.NDArray[Any] | Sequence[str], labels: npt.NDArray[Any] | Sequence[str]
) -> float:
    """Compute one metric, in percent.

    >>> score("accuracy", np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))
    50.0

    Args:
        metric: One of `METRICS`. "f1" is that of class 1, as GLUE has it.
        predictions: (n, classes) logits or (n,) class ids for class metrics, (n,) or (n, 1) values for pearson and
            spearman; for exact_match and rouge_l n strings, or (n, answers) scores of known answers; for open answers the (n, 4)
            columns of `MEASURED`, or (n, 7) with those of `OF_SLOTS`.
        labels: n of the same kind; `OPEN` for open answers.

    Returns:
        100 for perfect. Correlation with a constant is 0 (it is undefined; a model that says one thing knows nothing).
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", hint=f"one of {', '.join(METRICS)}")
    if len(predictions) != len(labels) or len(labels) == 0:
        raise RunError(f"{plural(len(predictions), 'prediction')} for {plural(len(labels), 'label')}")
    if not isinstance(predictions, np.ndarray) and metric == "rouge_l":
        return float(np.mean([rouge_l(p, str(y)) for p, y in zip(predictions, labels, strict=True)]))
    if not isinstance(predictions, np.ndarray) and metric == "exact_match":
        return 100.0 * float(np.mean([p.strip() == g.strip() for p, g in zip(predictions, labels, strict=True)]))
    values = np.asarray(predictions)
    if bad := int((~np.isfinite(values)).sum()):
        raise RunError(f"{plural(bad, 'prediction', 'is', 'are')} NaN or infinite")
    if metric in TEXT_METRICS and np.all(np.asarray(labels) == OPEN):
        return float(open_score(metric, values, np.ones((1, len(values))))[0])
    if metric in VALUE_METRICS:
        return _correlation(metric, values.reshape(len(labels)), np.asarray(labels))
    return _class_score(metric, values.argmax(-1) if values.ndim == 2 else values, np.asarray(labels))


def open_score(metric: str, measured: npt.NDArray[Any], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute a metric of open answers, in percent, for every row of weights.

    Args:
        metric: "exact_match", "rouge_l", "likelihood": the geometric mean of the probabilities of the right answers'
            tokens, that is 100 / perplexity; "slot_f1": F1 over the (slot, value) pairs of all rows together (micro), 0
            where there are none; "intent_accuracy".
        measured: (n, 4), the columns of `MEASURED`, or (n, 7) with those of `OF_SLOTS`.
        weights: (k, n).
    """
    exact, rouge, logs, tokens, *slots = measured.astype(np.float64).T
    if metric in SLOT_METRICS:
        hits, both, intents = slots
        if metric == "intent_accuracy":
            right: npt.NDArray[np.float64] = 100.0 * (weights @ intents) / weights.sum(1)
            return right
        pairs = weights @ both
        f1: npt.NDArray[np.float64] = np.divide(
            200.0 * (weights @ hits), pairs, out=np.zeros_like(pairs), where=pairs > 0
        )
        return f1
    if metric == "likelihood":
        perplexities: npt.NDArray[np.float64] = 100.0 * np.exp((weights @ logs) / np.maximum(weights @ tokens, 1.0))
        return perplexities
    chosen = 100.0 * exact if metric == "exact_match" else rouge
    return (weights @ chosen) / weights.sum(1)  # type: ignore[no-any-return]


def rouge_l(written: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, case and punctuation aside, in percent.

    >>> rouge_l("the cat sat", "the cat slept")
    66.66666666666667
    """
    a, b = (_words(text.lower()) for text in (written, reference))
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return 200.0 * lengths[-1] / (len(a) + len(b)) if a and b else 0.0


def _words(text: str) -> list[str]:
    """Split a text into words: letters and digits, and the marks that belong to them (vowels of Hindi or Thai, loose accents)."""
    if text.isascii():
        return re.findall(r"[^\W_]+", text)
    return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()


def _class_score(metric: str, predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    from sklearn import metrics

    if metric in ("accuracy", "exact_match"):  # of choosing among known answers
        return 100.0 * float((predicted == labels).mean())
    if metric == "matthews":
        return 100.0 * float(metrics.matthews_corrcoef(labels, predicted))
    if metric == "f1":
        return 100.0 * float(metrics.f1_score(labels, predicted, labels=[1], average="micro", zero_division=0.0))
    return 100.0 * float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0))


def _correlation(metric: str, predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    from scipy import stats

    x, y = predicted.astype(np.float64), labels.astype(np.float64)
    if np.ptp(x) <= 1e-12 * max(1.0, np.abs(x).max()) or np.ptp(y) == 0:
        return 0.0
    return 100.0 * float((stats.pearsonr if metric == "pearson" else stats.spearmanr)(x, y).statistic)


def scores(
    metrics: Sequence[str], predictions: npt.NDArray[Any] | Sequence[str], labels: npt.NDArray[Any] | Sequence[str]
) -> dict[str, float]:
    """Compute all of a task's metrics, in percent.

    >>> scores(["accuracy", "f1"], np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))
    {'accuracy': 100.0, 'f1': 100.0}
    """
    return {m: score(m, predictions, labels) for m in metrics}


def primary(values: Mapping[str, float]) -> float:
    """Average a task's metrics into its score, as GLUE's own average does.

    >>> primary({"accuracy": 90.0, "f1": 80.0})
    85.0
    """
    return float(np.mean(list(values.values())))
