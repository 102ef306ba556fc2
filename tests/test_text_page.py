"""The page of the study of written tasks: shares, tests over tasks, and the curves it hands on, from small records."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_page", ROOT / "benchmarks" / "text_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(alone, merged, floor=None):
    """Two halves of equal scores; three tasks."""
    merge = {"scale": 0.5, "scores": [merged, merged], "general_kl": 0.1}
    return {
        "tasks": ["snli", "a", "b"],
        "alone": [alone, alone],
        "floor": [floor, floor] if floor else None,
        "merges": {"task_arithmetic": merge},
        "general_kl_alone": {"snli": 0.01, "a": 0.05, "b": 0.02},
        "norms": {"snli": 1.0, "a": 2.0, "b": 3.0},
    }


def test_shares_are_of_own_adapters_over_tasks_that_the_plain_arm_learns(page):
    records = {
        "fixed-0-kaiming": record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0]),  # gains 2 points on b
        "fixed-0-contrastive": record([60.0, 110.0, 90.0], [60.0, 60.0, 0.0]),
    }
    plain, ours = page.rows_of(records)
    assert plain["shares"] == {"snli": 0.75, "a": 0.5} and plain["recovered"] == 0.625
    assert ours["shares"] == {"snli": 1.0, "a": 0.5} and ours["recovered"] == 0.75
    assert ours["share_of_means"] == pytest.approx((50 + 50) / (50 + 100), abs=1e-4)
    assert (ours["floor"], ours["individual"], ours["general_kl_alone"]) == (10.0, 86.6667, 0.05)


def test_tests_over_tasks_are_t_and_exact_flips(page):
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.25])
    made = page.test_of(d)
    expected = stats.ttest_1samp(d, 0.0)
    assert made["p"] == pytest.approx(expected.pvalue)
    assert (made["low"], made["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    means = [abs(np.mean(d * np.array(s))) for s in itertools.product((1, -1), repeat=5)]
    assert made["p_flips"] == pytest.approx(np.mean([m >= d.mean() - 1e-12 for m in means]))
    assert made["smallest_p_flips"] == 2 / 32


def test_the_published_page_follows_from_its_rows(page):
    whole = json.loads((ROOT / "docs" / "results" / "text-qwen15.json").read_text())
    assert whole["tests"] == page.tests_of(whole["rows"])
    for row in whole["rows"]:
        assert row["recovered"] == pytest.approx(np.mean(list(row["shares"].values())), abs=1e-3)
        assert row["merged"] == pytest.approx(np.mean(list(row["tasks"].values())), abs=1e-3)
    registered = {(t["arm"], t["against"]): t for t in whole["tests"] if t["registered"]}
    assert set(registered) == {("contrastive", "kaiming"), ("contrastive_penalised", "contrastive")}
    assert all(t["p"] <= t["p_holm"] <= 1 for t in registered.values())
