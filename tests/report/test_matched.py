"""Arms at equal norm and equal score alone: curves without extrapolation, only while the score alone rises."""

from __future__ import annotations

import math

import pytest

from plait.report.matched import matched_rows, rising
from plait.report.sweep_sections import matched_section


def swept(arm, lr, alone, norm, merged, step=0):
    """A row of the sweep under one merge, "m"."""
    return {
        "arm": arm,
        "lr": lr,
        "step": step,
        "alone": alone,
        "delta_norm": norm,
        "merged": {"m": merged},
        "scale": {"m": 1.0},
    }


REFERENCE = [swept("r", 1e-3, 80.0, 4.0, 60.0), swept("r", 1e-4, 60.0, 1.0, 40.0)]  # not in order of the rate


def found(sweep, what, arm="a"):
    """The one row of an arm and a way to match."""
    (row,) = [r for r in matched_rows(sweep, "r") if (r.arm, r.matched) == (arm, what)]
    return row


def test_norms_are_compared_on_a_logarithmic_scale_and_scores_on_a_plain_one():
    sweep = [*REFERENCE, swept("a", 1e-3, 65.0, 2.0, 53.0)]
    norm, alone = found(sweep, "norm"), found(sweep, "alone")
    assert norm.at == (2.0,) and norm.reference_merged == pytest.approx(50.0)  # halfway from 1 to 4 in log
    assert norm.difference == pytest.approx(3.0) and norm.against == "r" and norm.merge == "m"
    assert alone.at == (65.0,) and alone.reference_merged == pytest.approx(45.0)
    assert alone.arm_merged == 53.0 and alone.difference == pytest.approx(8.0)


def test_the_difference_is_the_mean_over_the_points_inside_and_there_is_no_outside():
    points = [(1e-4, 0.9, 0.0), (2e-4, 1.0, 41.0), (3e-4, 4.0, 63.0), (4e-4, 4.1, 99.0)]  # inside: the ends themselves
    mine = [swept("a", lr, 61.0 + i, norm, merged) for i, (lr, norm, merged) in enumerate(points)]
    row = found([*REFERENCE, *mine], "norm")
    assert (row.at, row.of, row.difference) == ((1.0, 4.0), 4, pytest.approx(2.0))
    far = found([*REFERENCE, swept("a", 1e-3, 90.0, 9.0, 70.0)], "norm")
    assert far.at == () and far.of == 1
    assert far.arm_merged is far.reference_merged is far.difference is None


def test_every_moment_has_a_curve_of_its_own():
    early = [swept("r", 1e-4, 50.0, 1.0, 20.0, step=5), swept("r", 1e-3, 70.0, 4.0, 30.0, step=5)]
    mine = [swept("a", 1e-3, 60.0, 2.0, 26.0, step=5), swept("a", 1e-3, 65.0, 2.0, 58.0), swept("a", 1e-3, 1, 2, 0, 7)]
    row = found([*REFERENCE, *early, *mine], "norm")
    assert row.at == (2.0, 2.0) and row.of == 3  # of moment 7 the reference has no point
    assert row.difference == pytest.approx(((26.0 - 25.0) + (58.0 - 50.0)) / 2)


def test_what_lies_behind_the_best_score_alone_is_left_out_of_the_curve_and_of_the_points():
    fallen = swept("r", 1e-2, 65.0, 16.0, 10.0)
    sweep = [*REFERENCE, fallen, swept("a", 1e-4, 66.0, 2.0, 50.0), swept("a", 1e-3, 62.0, 3.0, 0.0)]
    assert found(sweep, "norm").at == (2.0,) and found(sweep, "alone").at == (66.0,)
    assert found(sweep, "alone").reference_merged == pytest.approx(46.0)  # 65 points are there twice: 45 and 10
    beyond = found([*REFERENCE, fallen, swept("a", 1e-4, 66.0, 8.0, 50.0)], "norm")
    assert beyond.at == ()  # norms that the reference has only behind its best


def test_a_dip_before_the_best_is_passed_over():
    rows = [swept("r", lr, alone, 1.0, 0.0) for lr, alone in ((1, 50.0), (2, 49.0), (3, 60.0), (4, 60.0), (5, 59.0))]
    assert [r["lr"] for r in rising(rows, "alone")] == [1, 3]


def test_joint_and_diverged_rows_are_passed_over():
    joint = {**swept("joint", 1e-3, 70.0, 2.0, 0.0), "merged": {}}
    lost = {"arm": "a", "lr": 1.0, "step": 0, "alone": None, "delta_norm": None, "merged": {}, "diverged": "NaN"}
    sweep = [*REFERENCE, joint, lost, swept("a", 1e-3, 65.0, 2.0, 53.0)]
    assert matched_rows(sweep, "r") == matched_rows([r for r in sweep if r not in (joint, lost)], "r")
    assert {r.arm for r in matched_rows(sweep, "r")} == {"a"} and matched_rows(REFERENCE, "r") == []


def test_the_page_says_where_and_how_many_or_that_there_is_no_overlap():
    mine = [swept("a", 1e-4, 65.0, 2.0, 53.0), swept("a", 1e-3, 90.0, math.sqrt(8), 53.0)]
    sweep = [*REFERENCE, *mine, swept("far", 1e-3, 90.0, 9.0, 70.0)]
    (table,) = matched_section(matched_rows(sweep, "r")).tables
    assert table.header == ("arm", "at the same delta norm", "m", "at the same score alone", "m")
    assert table.rows == [
        ("`a`", "2.0 to 2.8 (2 of 2)", "+0.5", "65.0 (1 of 2)", "+8.0"),
        ("`far`", "no overlap", "–", "no overlap", "–"),
    ]
