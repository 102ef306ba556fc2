"""The report of a plain recipe, which is a study with one wave: nothing was tuned, and the grid of scales is what it says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from plait.recipes.recipe_file import parse_recipe
from plait.report.account import account_of
from plait.report.line import run
from plait.report.table import reference
from plait.runs.folder import layout_of_folder
from tests.conftest import tiny_raw
from tests.report.conftest import Page


@pytest.fixture(scope="module")
def plain_run(tiny_base, tmp_path_factory):
    """The folder of a finished run, and what it returned."""
    root = tmp_path_factory.mktemp("plain")
    raw = tiny_raw(tiny_base("bert"), "bert", root / "data", ["topic", "grade"])
    raw |= {"arms": ["kaiming", "gaussian", "contrastive"], "merges": ["task_arithmetic", "regmean"], "seeds": [0]}
    raw |= {
        "training": {"steps": 20, "batch_size": 8, "lr": 0.03},
        "evaluation": {"scales": [0.3, 0.5, 1.0], "resamples": 50},
    }
    return root / "out", run(parse_recipe(raw, "plain"), root / "out", quiet=True)


def test_it_has_the_sections_of_a_study_but_those_of_a_sweep(plain_run):
    out, _ = plain_run
    text = (out / "report" / "report.html").read_text("utf-8")
    titles = re.findall(r'<h2 id="s\d">(.*?)</h2>', text)
    assert titles == [
        "Each arm under its best merge", "Every task under every arm and merge", "How much the scale matters", "References",
        "Comparisons", "What tells beforehand", "What the statistics predict", "What the words mean",
    ]  # fmt: skip
    assert Page(text).fetched == [] and text.count('class="heat"') == 3 and "tuning seed" not in text
    assert "50 resamples" in text and "load_head" in text


def test_its_headline_says_what_its_rows_say(plain_run):
    out, found = plain_run
    tables = json.loads((out / "report" / "report.json").read_text("utf-8"))
    assert tables["schema"] == 2 and tables["sweep"] == [] and tables["resamples"] == 50
    for row in tables["rows"]:
        arm, merge = row["arm"], row["method"]
        assert found["merged"][arm][merge] == pytest.approx(row["merged"], rel=1e-5)
        assert found["recovered"][arm][merge] == pytest.approx(row["recovered"], rel=1e-5)
        assert found["recovered_of_own"][arm][merge] == pytest.approx(row["recovered_of_own"], rel=1e-5)
        assert found["individual"][arm] == pytest.approx(row["individual"], rel=1e-5)
        assert found["floor"] == pytest.approx(row["floor"], rel=1e-5)
    assert len(tables["rows"]) == 6 and found["report"].endswith("report.html")


def test_its_reference_is_the_plain_arm_that_is_best_alone(plain_run):
    layout = layout_of_folder(plain_run[0])
    rows = {r.arm: r.individual for r in account_of(layout).rows}
    best = max(("kaiming", "gaussian"), key=lambda a: rows[a])
    ends = reference(layout, 0)
    assert ends.arm == best and np.mean(list(ends.alone.values())) == pytest.approx(rows[best])


def test_curves_go_over_the_scales_that_were_asked_for(plain_run):
    account = account_of(layout_of_folder(plain_run[0]))
    assert account.scales == [] and {x for c in account.curves for x, _ in c.points} == {0.3, 0.5, 1.0}
    edges = [r for r in account.rows if r.edge]
    assert all(set(r.scales) & {0.3, 1.0} for r in edges)
    assert bool(edges) == any("edge of its grid" in r.first for r in account.remarks)


def test_without_resamples_there_are_no_intervals(plain_run, tmp_path):
    layout = layout_of_folder(plain_run[0], ["evaluation.resamples=0"])
    account = account_of(layout)
    assert set(account.inference.intervals.values()) == {None}
    assert all(s.merged is None for s in account.inference.spreads.values())
    assert {c.undefined for c in account.inference.comparisons} == {"nothing was resampled"}
