"""The page of the study of written tasks: shares, tests over tasks, and the curves it hands on, from small records."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("text_page")


@pytest.fixture(scope="module")
def account(page) -> ModuleType:
    return importlib.import_module("text_account")


@pytest.fixture(scope="module")
def steps(page) -> ModuleType:
    return importlib.import_module("text_steps")


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


def test_shares_are_of_own_adapters_over_tasks_that_the_plain_arm_learns(account):
    records = {
        "fixed-0-kaiming": record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0]),  # gains 2 points on b
        "fixed-0-contrastive": record([60.0, 110.0, 90.0], [60.0, 60.0, 0.0]),
    }
    plain, ours = account.rows_of(records)
    assert plain["shares"] == {"snli": 0.75, "a": 0.5} and plain["recovered"] == 0.625
    assert ours["shares"] == {"snli": 1.0, "a": 0.5} and ours["recovered"] == 0.75
    assert ours["share_of_means"] == pytest.approx((50 + 50) / (50 + 100), abs=1e-4)
    assert (ours["floor"], ours["individual"], ours["general_kl_alone"]) == (10.0, 86.6667, 0.05)


def test_tests_over_tasks_are_t_and_exact_flips(account):
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.25])
    made = account.test_of(d)
    expected = stats.ttest_1samp(d, 0.0)
    assert made["p"] == pytest.approx(expected.pvalue)
    assert (made["low"], made["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    means = [abs(np.mean(d * np.array(s))) for s in itertools.product((1, -1), repeat=5)]
    assert made["p_flips"] == pytest.approx(np.mean([m >= d.mean() - 1e-12 for m in means]))
    assert made["smallest_p_flips"] == 2 / 32


def test_a_share_is_the_mean_over_conditions_and_seeds_that_count(account):
    def row(arm, seed, condition, **shares):
        return {"arm": arm, "method": "task_arithmetic", "seed": seed, "condition": condition, "shares": shares}

    rows = [row(arm, 0, "told", a=9.0, b=9.0, c=9.0) for arm in account.ARMS]  # seen before: not counted
    for i, arm in enumerate(account.ARMS):
        up = 0.5 if arm == "contrastive" else 0.01 * i
        rows += [
            row(arm, 1, "told", a=0.5 + up, b=0.2, c=0.1),
            row(arm, 1, "bare", a=0.1, b=0.4 + up),
        ]  # c is not learnt in bare
    test = next(
        t
        for t in account.tests_of(rows, [1])
        if (t["arm"], t["against"], t["tasks"]) == ("contrastive", "kaiming", "all")
    )
    assert test["n"] == 3 and test["difference"] == pytest.approx((0.25 + 0.25 + 0.0) / 3, abs=1e-4)
    assert account.test_of([0.25, 0.25, 0.0])["p"] == pytest.approx(test["p"], abs=1e-4)


def test_joint_training_stands_beside_the_plain_arms_own_adapters(account):
    records = {
        "fixed-1-kaiming": record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0]),
        "fixed-1-joint": {**record([30.0, 85.0, 50.0], [0.0, 0.0, 0.0]), "merges": {}},
    }
    (row,) = account.references_of(records, "bare")
    assert (row["condition"], row["seed"], row["score"]) == ("bare", 1, 55.0)
    assert row["recovered"] == pytest.approx((0.5 + 1.5) / 2)  # the third task is not learnt alone
    assert [r["arm"] for r in account.rows_of(records)] == ["kaiming"]


def test_merges_without_labels_are_shares_of_own_adapters(steps):
    records = {
        "fixed-1-kaiming": record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0]),
        "auto_all-1-kaiming": {
            "tasks": ["snli", "a", "b"],
            "steps": {
                "chosen": {"scores": [[30.0, 60.0, 0.0]] * 2, "general_kl": 0.2, "fidelity": 0.5, "seconds_until": 9.0}
            },
        },
    }
    (row,) = steps.existing_of(records, "told")
    assert (row["arm"], row["seed"], row["positions"], row["step"]) == ("kaiming", 1, "all", "chosen") and row[
        "merged"
    ] == 30.0
    assert row["recovered"] == pytest.approx((0.5 + 1.0) / 2)  # the third task is not learnt alone


def test_a_merge_without_labels_is_measured_against_the_ends_scored_with_it(steps):
    """Adapters trained anew are not those of the fixed record; what the steps keep stands as keys."""
    record_ = {
        "tasks": ["snli", "a"], "alone": [[50.0, 60.0]] * 2, "floor": [[10.0, 40.0]] * 2,
        "steps": {
            "no text": {"scores": [[30.0, 50.0]] * 2, "general_kl": 0.2, "fidelity": 0.5, "seconds_until": 9.0},
            "repaired": {"scores": [[50.0, 55.0]] * 2, "general_kl": 0.1, "fidelity": 0.9, "seconds_until": 99.0, "rate": 0.03},
        },
    }  # fmt: skip
    rows = steps.existing_of({"auto_written-1-kaiming": record_}, "told")
    assert [r["recovered"] for r in rows] == [0.5, 0.875]
    assert steps.summary_of(rows) == {
        "recovered_no_text": 0.5, "general_kl_no_text": 0.2, "recovered_repaired": 0.875, "general_kl_repaired": 0.1,
    }  # fmt: skip
    assert steps.summary_of([{**rows[0], "positions": "all"}]) == {}


def test_joint_training_for_longer_is_a_reference_of_its_own(page, account):
    plain = record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0])
    longer = {**record([50.0, 60.0, 50.0], [0.0, 0.0, 0.0]), "merges": {}}
    rows = account.references_of({"fixed-1-kaiming": plain, "fixed-1-joint": longer, "fixed-1-joint_360": longer})
    assert [r["reference"] for r in rows] == ["joint", "joint_360"] and rows[1]["recovered"] == 1.0
    text = page.page(
        "some", {"told": {"fixed-1-kaiming": plain}}, account.rows_of({"fixed-1-kaiming": plain}), [], rows
    )
    assert "all nine tasks together for 360 steps, seed 1: 53.3, 100 %" in text and text.count("no upper bound") == 1
    assert account.references_of({"fixed-1-joint": longer}) == []  # without the plain arm there is no share


def test_what_was_expected_stands_beside_what_came(account):
    def row(arm, method, condition, seed, recovered):
        return {"arm": arm, "method": method, "condition": condition, "seed": seed, "recovered": recovered}

    rows = [row("contrastive_penalised", "task_arithmetic", "told", s, v) for s, v in ((0, 0.0), (1, 0.8), (2, 1.0))]
    rows += [row(a, "regmean", "told", 1, 0.9 - 0.1 * i) for i, a in enumerate(account.ARMS)]
    rows += [row("kaiming", m, "told", 1, v) for m, v in (("tsv", 0.5), ("knots", 0.6), ("ties", 0.1))]
    rows += [row("kaiming", m, "told", 1, 0.0) for m in ("task_arithmetic", "dare_ties", "core_space")]
    first, regmean, default = account.expected_of(rows, [1, 2])
    assert (first["came"], first["least"]) == (0.9, 0.9)
    assert regmean["came"] == pytest.approx(0.5) and "contrastive_penalised" in regmean["expected"]
    assert (default["came"], default["least"]) == (0.5, 0.6) and default["expected"].endswith("knots")


def test_the_published_page_follows_from_its_rows(account):
    whole = json.loads((ROOT / "docs" / "results" / "text-qwen15.json").read_text())
    assert whole["tests"] == account.tests_of(whole["rows"], whole["tested"])
    assert whole["expected"] == account.expected_of(whole["rows"], whole["tested"])
    for row in whole["rows"]:
        assert row["recovered"] == pytest.approx(np.mean(list(row["shares"].values())), abs=1e-3)
        assert row["merged"] == pytest.approx(np.mean(list(row["tasks"].values())), abs=1e-3)
    registered = {(t["arm"], t["against"]): t for t in whole["tests"] if t["registered"]}
    assert set(registered) == {("contrastive", "kaiming"), ("contrastive_penalised", "contrastive")}
    assert all(t["p"] <= t["p_holm"] <= 1 for t in registered.values())


def test_other_studies_are_described_and_not_tested(page, account):
    """Arms that a study does not have are left out; nothing of it was registered."""
    three = record([50.0, 60.0, 30.0], [40.0, 35.0, 20.0], [10.0, 10.0, 10.0])
    better = record([50.0, 60.0, 30.0], [45.0, 55.0, 30.0])
    records = {"fixed-0-kaiming": three, "fixed-0-contrastive_penalised": better}
    rows = account.rows_of(records)
    tests = account.tests_of(rows, registered_study=False)
    assert {(t["arm"], t["against"]) for t in tests} == {("contrastive_penalised", "kaiming")}
    assert not any(t["registered"] or "p_holm" in t for t in tests)
    text = page.page("wide", {"told": records}, rows, tests, [], study="text-qwen15-wide")
    assert (
        "9 tasks" in text and "rank 64 on q, k, v, o, gate, up, 120 steps" in text and "text-qwen15-wide.yaml" in text
    )
    assert "16 tasks" in page.extent_of("text-qwen15-16") and page.extent_of(page.MAIN).startswith("nine tasks")


def test_without_the_plain_arm_there_is_no_floor_and_the_page_says_so(page, account):
    records = {"fixed-0-contrastive": record([60.0, 100.0, 80.0], [30.0, 100.0, 60.0])}
    rows = account.rows_of(records)
    assert [(r["of_own"], "recovered" in r, "floor" in r) for r in rows] == [(0.75, False, False)]
    assert account.tests_of(rows, registered_study=False) == []
    text = page.page("some", {"told": records}, rows, [], [], study="text-qwen15-16")
    assert (
        "The plain arm and the bare base are missing" in text
        and "| of own score, % | KL |" in text
        and "**75**" in text
    )
    assert "share kept, %" not in text and "floor |" not in text and "Comparisons" not in text and "curves" not in text


def test_rounds_are_measured_by_their_own_adapters_and_by_the_plain_arms(page, account, steps):
    def of(alone, by_rule, by_moments=None, floor=None):
        merges = {"task_arithmetic, by rule": by_rule, "task_arithmetic": by_moments}
        made = {n: {"scale": 0.3, "scores": [x] * 2, "general_kl": 0.1} for n, x in merges.items() if x}
        return {**record(alone, alone, floor), "merges": made}

    floor = [10.0, 10.0, 10.0]
    records = {
        "fixed-1-kaiming": of([50.0, 60.0, 12.0], [30.0, 20.0, 0.0], [34.0, 25.0, 0.0], floor),  # gains 2 points on b
        "fixed-1-contrastive_penalised": of([50.0, 60.0, 12.0], [30.0, 35.0, 0.0], [46.0, 50.0, 0.0]),
        "rounds-1-rounds": of([30.0, 35.0, 99.0], [30.0, 30.0, 99.0], None, [11.0, 10.0, 12.0]),
        "rounds-1-restarted": of([50.0, 60.0, 12.0], [30.0, 35.0, 0.0], [46.0, 50.0, 0.0], floor),
        "rounds-2-rounds": of([30.0, 35.0, 99.0], [30.0, 30.0, 99.0], None, floor),  # no plain arm of this seed
    }
    rows = steps.rounds_of(records, "told")
    plain, _, _, _, ours, *_ = rows
    assert [(r["arm"], r["seed"]) for r in rows[4:]] == [("rounds", 1), ("restarted", 1), ("restarted", 1)]
    assert ours["shares"] == {"snli": 1.0, "a": 0.8} and ours["of_plain_tasks"] == {"snli": 0.5, "a": 0.4}
    assert (ours["recovered"], ours["of_plain"], ours["floor_again"]) == (0.9, 0.45, 11.0)
    assert (
        plain["recovered"] == plain["of_plain"] == pytest.approx((0.5 + 0.2) / 2)
    )  # its own adapters are the yardstick
    differences = {(d["arm"][0], d["against"][0], d["against"][1]): d for d in steps.rounds_differences(rows)}
    beside = differences["rounds", "kaiming", "task_arithmetic, by rule"]
    assert beside["difference"] == pytest.approx((0.0 + 0.2) / 2) and (beside["n"], beside["seeds"]) == (2, 1)
    assert differences["restarted", "contrastive_penalised", "task_arithmetic"]["difference"] == 0.0
    assert not any(key[0] == "refreshed" for key in differences)
    text = page.page("some", {"told": records}, account.rows_of(records), [], [])
    assert "## Rounds, and moments refreshed halfway" in text and "benchmarks/text_rounds.py --study" in text
    assert "| `rounds` | told, 1 | task_arithmetic, by rule | 0.30 | 54.7 | 53.0 | 90 | 89 | **45** |" in text
    assert "The bare base scores 10.0, and 10.5 where it was scored again" in text
    assert "Not run: `rounds_penalised`, `refreshed`." in text
    assert "| `rounds` (by rule) - `kaiming` (by rule) | 2 | +10 |" in text
    without = {k: r for k, r in records.items() if k.startswith("fixed-")}
    assert "Rounds" not in page.page("some", {"told": without}, account.rows_of(without), [], [])


def test_the_price_outside_stands_beside_the_bare_base(page, account, steps):
    def cost(scores, perplexity, kl):
        return {"scores": scores, "perplexity": perplexity, "general_kl": kl}

    record_ = {
        "tasks": ["sst2", "cola"], "base": cost([90.0, 70.0], 20.0, 0.0),
        "alone": {"a": cost([80.0, 60.0], 21.0, 0.1), "b": cost([70.0, 66.0], 25.0, 0.3)},
        "merges": {"task_arithmetic": cost([88.0, 68.0], 20.5, 0.05)},
    }  # fmt: skip
    rows = steps.prices_of({"price-1-kaiming": record_, "fixed-1-kaiming": {}}, "told")
    assert [(r["worn"], r["alone"]) for r in rows] == [
        ("bare base", False), ("adapter of a", True), ("adapter of b", True), ("task_arithmetic", False),
    ]  # fmt: skip
    plain = record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0])
    runs = {"told": {"fixed-1-kaiming": plain, "price-1-kaiming": record_}}
    text = page.page("some", runs, account.rows_of(runs["told"]), [], [])
    assert "| | | bare base | 90.0 | 70.0 | 20.00 | 0.000 |" in text
    assert "| `kaiming` | told, 1 | alone | 75.0 | 63.0 | 23.00 | 0.200 |" in text
    assert "| | | alone, the worst | 70.0 | 60.0 | 25.00 | 0.300 |" in text
    assert "| | | task_arithmetic | 88.0 | 68.0 | 20.50 | 0.050 |" in text


def test_merges_that_need_nothing_but_the_adapters_stand_beside_the_first(page, account, steps):
    """Two halves of three tasks, of which the adapters learn two; three scales, the rule's in the middle."""

    def ladder(*rungs):
        return {
            "scales": [0.5, 1.0, 2.0],
            "rule": 0.95,
            "moments": 0.8,
            "scores": [[[a, b, 9.0]] * 2 for a, b in rungs],
        }

    found = {
        "tasks": ["snli", "a", "b"], "alone": [[50.0, 60.0, 12.0]] * 2, "floor": [[10.0, 10.0, 10.0]] * 2, "crossed": {},
        "methods": {
            "iso_c": ladder((10.0, 10.0), (30.0, 35.0), (26.0, 20.0)),  # 0 and 0; 0.5 and 0.5; 0.4 and 0.2
            "wudi": ladder((14.0, 10.0), (18.0, 20.0), (34.0, 60.0)),  # 0.1 and 0; 0.2 and 0.2; 0.6 and 1.0
        },
    }  # fmt: skip
    first, other = steps.ladders_of({"nodata-2-kaiming": found, "fixed-2-kaiming": {}}, "told")
    assert first["recovered"] == [0.0, 0.5, 0.3] and first["difference"] is None
    assert (first["at_rule"], first["best"], first["best_scale"], first["edge"]) == (0.5, 0.5, 1.0, False)
    assert (other["at_rule"], other["best"], other["best_scale"], other["edge"]) == (0.2, 0.8, 2.0, True)
    assert other["difference"]["difference"] == pytest.approx((0.1 + 0.5) / 2)
    expected = stats.ttest_1samp([0.1, 0.5], 0.0).confidence_interval(0.95)
    assert (other["difference"]["low"], other["difference"]["high"]) == pytest.approx(tuple(expected), abs=1e-3)
    plain = record([50.0, 60.0, 12.0], [40.0, 35.0, 12.0], [10.0, 10.0, 10.0])
    runs = {"told": {"fixed-2-kaiming": plain, "nodata-2-kaiming": found}}
    text = page.page("some", runs, account.rows_of(runs["told"]), [], [])
    assert "| `kaiming`, told, seed 2 | iso_c | 0.5: 0, 1: 50, 2: 30 | 50 | **50** |  |" in text
    assert "| wudi | 0.5: 5, 1: 20, 2: 80 | 20 | **80** (at the edge) | +30 (-224 to +284) |" in text
