"""The older studies by the second protocol: shares of own gains, recomputed from an archive, and tests over tasks."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from plait.runs.folder import layout_of_folder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
STUDY = "text3-smollm2-rank32"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import second_protocol
    finally:
        sys.path.pop(0)
    return second_protocol


def test_a_share_is_read_at_its_scale_between_own_floor_and_own_score(script):
    """The line at scale 2 between scored 1 and 4 is half way over log scale."""
    merge = script.Merge("s", "b", 2, "kaiming", "task_arithmetic", 0, {"label_free": {"a": 0.5, "b": 1.0}}, 0.25)
    (row,) = script.rows_of([script.replace(merge, shares={**merge.shares, "by_labels": {"a": 0.0, "b": 1.0}})])
    assert (row["label_free"], row["by_labels"], row["first"], row["counted"]) == (0.75, 0.5, 0.25, 2)
    assert script.read([(1.0, 10.0), (4.0, 20.0)], 2.0) == pytest.approx(15.0)


def test_differences_are_over_tasks_that_count_in_both(script):
    def merge(arm, seed, **shares):
        return script.Merge("s", "b", 3, arm, "task_arithmetic", seed, {"by_labels": shares}, 0.0)

    merges = [merge("kaiming", 0, a=0.1, b=0.2, c=0.3), merge("kaiming", 1, a=0.3, b=0.2)]
    merges += [merge("contrastive", 0, a=0.5, b=0.9), merge("contrastive", 1, a=0.7, b=0.7)]
    (test,) = script.tests_of(merges)
    p = stats.ttest_1samp([0.6 - 0.2, 0.8 - 0.2], 0.0).pvalue
    assert (test["n"], test["difference"]) == (2, pytest.approx(0.5)) and test["p"] == pytest.approx(p, abs=1e-4)


def test_the_published_rows_follow_from_the_archive(script, tmp_path):
    with tarfile.open(RESULTS / f"{STUDY}.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    merges = list(script.merges_of(layout_of_folder(next(tmp_path.iterdir())), {}))
    published = [r for r in json.loads((RESULTS / "second-protocol.json").read_text())["rows"] if r["study"] == STUDY]
    assert script.rows_of(merges) == published
    table = json.loads((RESULTS / f"{STUDY}.json").read_text())["rows"]
    for row in published:  # the first protocol's number is the one of its own page, mean over seeds
        names = {"task_arithmetic + pico": "task_arithmetic_pico"}
        theirs = [
            r["recovered"]
            for r in table
            if (r["arm"], r["method"]) == (row["arm"], names.get(row["method"], row["method"]))
        ]
        assert row["first"] == pytest.approx(np.mean(theirs), abs=1e-3)
