"""The t interval that pages quote, and the pages that quote it: what is published follows from what was recorded."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def published(name: str):
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def test_the_interval_is_students(script):
    t_interval = script("intervals").t_interval
    d = np.random.default_rng(0).standard_normal(9)
    made, expected = t_interval(d), stats.ttest_1samp(d, 0.0)
    assert (made.n, made.mean) == (9, pytest.approx(d.mean()))
    assert (made.low, made.high, made.p) == pytest.approx((*expected.confidence_interval(0.95), expected.pvalue))
    assert t_interval([2.0, 2.0]).p == 0.0 and math.isnan(t_interval([0.0, 0.0]).p)


def test_published_intervals_follow_from_their_records(script):
    whole = published("nf4")
    assert script("nf4").summary(whole["seeds"]) == whole["rows"]
    whole = published("existing-heads")
    summary = script("learnt_heads").summary(whole["seeds"])
    assert {k: whole[k] for k in summary} == summary
    whole = published("text-qwen15")
    assert script("text_account").tests_of(whole["rows"], whole["tested"]) == whole["tests"]
