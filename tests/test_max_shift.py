"""What a limit on the shift costs: shares and distances are those of the outputs, and the page says what no merge is within."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from plait.tasks import Source, Task

ROOT = Path(__file__).parents[1]
TASK = Task("topic", "classification", Source("none"), ("text",), labels=("a", "b"), metrics=("accuracy",))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("max_shift")


def logits(*classes: int) -> np.ndarray:
    return np.eye(2)[list(classes)] * 5.0


def test_shares_are_gains_over_the_base_and_distances_are_from_it(script):
    labels = {"topic": np.array([0, 1, 0, 1])}
    alone, bare, half = logits(0, 1, 0, 1), logits(0, 0, 1, 1), logits(0, 1, 0, 0)
    answers = {"topic": [alone, bare, alone, half, bare]}
    assert script.shares({"topic": TASK}, answers, labels) == [1.0, 0.5, 0.0]
    near, far, none = script.moved({"topic": TASK}, answers)
    assert none == 0.0 and far > near > 0
    rng = np.random.default_rng(0)
    drawn = script.moved({"topic": TASK}, answers, rng)
    assert drawn[2] == 0.0 and drawn != [near, far, none]


def test_a_limit_that_nothing_is_within_stands_on_the_page(script):
    row = {
        "limit": None, "recipe": "tsv", "scale": 0.7, "weights_learnt": True, "fit": False, "heads": [], "cpu_seconds": 3.2,
        "kept": 0.84, "kept_interval": [0.7, 0.99], "lost": 0.0, "lost_interval": [0.0, 0.0], "shift": 0.05, "shift_interval": [0.04, 0.06],
    }  # fmt: skip
    about = {"base": "B", "tasks": ["topic"], "methods": ["tsv"], "texts": 4, "general": 2, "rows": 9}
    text = script.page({"about": about, "versions": {"torch": "2"}, "rows": [row, {"limit": 0.001}]})
    assert "| none | tsv + weights at 0.70 | 0.050 (0.040 to 0.060) | **84** (70 to 99) |" in text
    assert "| 0.001 | nothing is within it |" in text
    assert script.limits_of("none,0.01") == [None, 0.01]
