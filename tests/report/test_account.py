"""The numbers of a report, recomputed by hand from what the run left on disk."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from plait.cli import main
from plait.errors import RunError, UsageError
from plait.evaluation.splits import HALVES
from plait.report import write_report
from plait.report.account import account_of
from plait.report.best import best_rows
from plait.report.numbers import headline_of
from plait.report.table import recovered, reference_unit, rows_of
from plait.report.verdict import verdict_of
from plait.runs.folder import layout_of_folder
from plait.runs.layout import Layout
from plait.runs.units import ALONE, FEATURES, FOLDS, MERGE, STATISTICS, Unit
from plait.runs.waves import all_units, next_wave, result
from tests.conftest import tiny_rows
from tests.report.conftest import finished


@pytest.mark.parametrize(
    ("score", "floor", "alone", "share"),
    [(58.0, 50.0, 60.0, 0.8), (50.6, 50.0, 51.2, 0.5), (61.0, 50.0, 60.0, 1.1), (49.0, 50.0, 60.0, -0.1)],
)
def test_a_share_is_what_adapters_alone_gain_over_the_floor(score, floor, alone, share):
    assert recovered(score, floor, alone) == pytest.approx(share)


def test_a_gain_of_a_point_or_less_has_no_share():
    """A threshold of another size changes what is published: a point sharp."""
    assert math.isnan(recovered(50.5, 50.0, 51.0)) and math.isnan(recovered(50.0, 50.0, 40.0))
    assert recovered(50.5, 50.0, 51.0 + 1e-9) == pytest.approx(0.5)
    shares = recovered(np.full(3, 55.0), np.full(3, 50.0), np.array([51.0, 51.5, 60.0]))
    assert np.isnan(shares[0]) and shares[1:] == pytest.approx([5 / 1.5, 0.5])


def test_rows_follow_from_the_results(study_done):
    """Both columns of recovered, the worst task and the mean of halves, from the manifests alone."""
    compared = 0
    for row in rows_of(study_done):
        merge = result(study_done, Unit(MERGE, row.seed, row.arm, row.lr, row.step, row.method, FOLDS))
        own, plain = (
            result(study_done, unit)
            for unit in (
                Unit(ALONE, row.seed, row.arm, row.lr, row.step, split=FOLDS),
                reference_unit(study_done, row.seed),
            )
        )
        tasks = {t: np.mean([merge["halves"][h]["score"][t] for h in HALVES]) for t in study_done.tasks}
        alone = {t: np.mean([own[h]["alone"][t] for h in HALVES]) for t in study_done.tasks}
        low, high = (np.mean([plain[h][k][t] for h in HALVES for t in tasks]) for k in ("floor", "alone"))
        merged, individual = np.mean(list(tasks.values())), np.mean(list(alone.values()))
        assert (row.merged, row.individual) == (pytest.approx(merged), pytest.approx(individual))
        assert (row.floor, row.plain) == (pytest.approx(low), pytest.approx(high))
        assert row.recovered == pytest.approx((merged - low) / (high - low))
        assert row.recovered_of_own == pytest.approx((merged - low) / (individual - low))
        assert row.worst_task == pytest.approx(min(tasks[t] - alone[t] for t in tasks)) and row.worst in tasks
        compared += row.recovered != pytest.approx(row.recovered_of_own)
    assert compared > 0  # an arm that is not the reference tells the two apart


def test_the_best_merge_of_a_half_is_the_other_halfs_choice(study_done):
    rows = rows_of(study_done)
    for b in best_rows(rows):
        mine = [r for r in rows if r.arm == b.arm]
        for half, merge in b.merges.items():
            means = {m: np.mean([r.selected[half] for r in mine if r.method == m]) for m in {r.method for r in mine}}
            assert means[merge] == max(means.values())
        merged = [
            np.mean([r.by_half[h] for h in HALVES for r in mine if (r.method, r.seed) == (b.merges[h], s)])
            for s in b.seeds
        ]
        assert b.merged == pytest.approx(merged)


def test_curves_pass_through_the_regrets(study_done):
    """At half and twice the chosen scale a curve is minus the regret, and zero at the chosen one."""
    account = account_of(study_done)
    curves = {(c.arm, c.merge): {round(x, 6): y for x, y in c.points} for c in account.scales}
    compared = 0
    for b in account.best:
        for merge in ("best", "task_arithmetic", "regmean"):
            assert curves[b.arm, merge][1.0] == 0.0
        for multiple, regret in ((0.5, b.regret_half), (2.0, b.regret_double)):
            if (point := curves[b.arm, "best"].get(multiple)) is not None:
                assert point == pytest.approx(-regret)
                compared += 1
    assert compared > 0


def test_the_headline_is_the_mean_of_the_rows(study_done):
    account = account_of(study_done)
    top = headline_of(account)
    for arm in ("kaiming", "orthonormal"):
        for merge in ("task_arithmetic", "regmean"):
            mine = account.of(arm, merge)
            assert len(mine) == 2 and top.merged[arm][merge] == pytest.approx(np.mean([r.merged for r in mine]))
            assert top.recovered[arm][merge] == pytest.approx(np.mean([r.recovered for r in mine]))
            assert top.individual[arm] == pytest.approx(np.mean([r.individual for r in mine]))
            assert top.worst_task[arm][merge][1] == pytest.approx(min(r.worst_task for r in mine))
            assert 0 < top.merged_standard_error[arm][merge] < 50


def test_the_floor_of_the_headline_counts_every_seed_once(study_done):
    account = account_of(study_done)
    floors = {r.seed: 10.0 + 10 * r.seed for r in account.rows}
    rows = [replace(r, floor=floors[r.seed]) for r in account.rows]
    fewer = [r for r in rows if r.arm == account.main or r.seed == min(floors)]  # an arm of one seed
    assert headline_of(replace(account, rows=fewer)).floor == pytest.approx(np.mean(list(floors.values())))


def test_an_ablation_without_a_share_does_not_take_the_studys_away(study_done):
    account = account_of(study_done)
    known = [replace(b, recovered=tuple(0.75 for _ in b.seeds)) for b in account.best]
    lost = "Seed 0 of ablation rank4: adapters alone reach 50.0, the floor is 50.0."
    verdict = verdict_of(replace(account, best=known, undefined=[lost]))
    assert verdict.number == "75 %" and "keeps **75 %**" in verdict.text and lost in verdict.notes
    verdict = verdict_of(replace(account, best=[replace(b, recovered=(math.nan,)) for b in known], undefined=[lost]))
    assert verdict.number == "–" and lost in verdict.text


def test_predicted_shifts_are_those_of_the_files(study_done):
    """Each adapter on each task's statistics, both read from disk here."""
    from plait.adapters.peft_format import read_adapter
    from plait.evaluation.interference import predicted_shift
    from plait.statistics import read_statistics

    account = account_of(study_done)
    assert set(account.interference) == {"kaiming", "orthonormal"}
    unit = Unit(FEATURES, 0, "orthonormal", account.of("orthonormal", "regmean")[0].lr, split=FOLDS)
    adapters, measured = study_done.path(study_done.trained_by(unit)), study_done.path(study_done.statistics_unit(unit))
    shifts = predicted_shift(read_adapter(adapters / "topic"), read_statistics(measured / "grade.stats.safetensors"))
    assert account.interference["orthonormal"]["topic"]["grade"] == pytest.approx(np.mean(list(shifts.values())))


def test_an_arm_that_nobody_knows_is_refused(study_done):
    with pytest.raises(UsageError, match="unknown arm"):
        account_of(study_done, against="nobody")


# --- what may be gone -------------------------------------------------------------------------------------------------


def test_adapters_and_statistics_may_be_gone(study_copy, tables_done):
    """Nobody reads them any more: the numbers and the figures are the same."""
    for room in ("train", "statistics"):
        shutil.rmtree(study_copy.out / room)
    layout = Layout(study_copy.recipe, study_copy.out)
    assert next_wave(layout) == ("", [])
    account = account_of(layout)
    assert account.interference == account_of(Layout(study_copy.recipe, study_copy.out)).interference != {}
    assert [r.recovered for r in account.rows] == pytest.approx(
        [r["recovered"] for r in tables_done[1]["rows"]], rel=1e-5
    )


def test_what_only_predictors_read_may_be_missing(study_copy, tables_done):
    for room in ("train", "statistics"):
        shutil.rmtree(study_copy.out / room)
    unit = next(u for u in all_units(study_copy) if u.stage == FEATURES and u.arm == "orthonormal" and u.seed == 0)
    shutil.rmtree(study_copy.path(unit))
    layout = Layout(study_copy.recipe, study_copy.out)
    name, todo = next_wave(layout)
    assert name == "statistics" and {u.stage for u in todo} == {STATISTICS}
    fewer, all_of_them = account_of(layout).predictors, tables_done[1]["predictors"]
    assert [p.n for p in fewer] == [p["n"] * 3 // 4 for p in all_of_them]  # of two arms and two seeds one is gone


def test_a_score_that_is_missing_is_said_and_done_again_without_the_sweep(study_copy, tables_done, tmp_path):
    for room in ("train", "statistics"):
        shutil.rmtree(study_copy.out / room)
    shutil.rmtree(study_copy.path(next(u for u in all_units(study_copy) if u.stage == MERGE and u.split == FOLDS)))
    with pytest.raises(RunError, match="not finished: 1 unit of wave 'scores'"):
        account_of(Layout(study_copy.recipe, study_copy.out))
    layout = finished(study_copy.recipe, study_copy.out)
    assert (
        len([r for r in (layout.out / "train").iterdir() if r.is_dir()]) == 1
    )  # the arm and seed of which a score was open
    written = write_report(layout, tmp_path, name="tiny")
    assert json.loads(written.json.read_text("utf-8"))["rows"] == tables_done[1]["rows"]


@pytest.fixture
def archived(small_study, tmp_path):
    """A finished study, with references and an ablation, whose base and data are gone."""
    root = tmp_path / "data"
    base = shutil.copytree(small_study().base.model, tmp_path / "base")
    layout = finished(small_study(seeds=[0], base={"model": str(base), "device": "cpu"}), tmp_path / "out")
    before = json.loads(write_report(layout, tmp_path / "before", name="tiny").json.read_text("utf-8"))
    for room in (root, base):
        shutil.rmtree(room)
    return layout.out, before


def table(capsys, out, to, *more):
    """The exit status of `plait study table` and what it says on stderr."""
    capsys.readouterr()  # what saving the base said, where this test is the first to need it
    with pytest.raises(SystemExit) as ended:
        main(["study", "table", str(out), "--to", str(to), *more])
    return ended.value.code, capsys.readouterr().err


def test_tables_need_neither_the_base_nor_the_data(archived, tmp_path, capsys):
    out, before = archived
    assert set(account_of(layout_of_folder(out)).interference) > {"kaiming", "contrastive"}  # adapters are still there
    for room in ("train", "statistics", "repair"):  # in an archive they are not
        shutil.rmtree(out / room)
    kept = (out / "inputs.json").read_text("utf-8")
    assert str(tmp_path) not in kept and tiny_rows(2, 24)[0]["text"] not in kept  # neither folders nor texts
    assert table(capsys, out, tmp_path / "to") == (0, "")
    again = json.loads((tmp_path / "to" / "tiny.json").read_text("utf-8"))
    for key in ("rows", "comparisons", "best", "references"):
        assert again[key] == before[key]
    assert any(r["variant"] for r in again["rows"]) and {r["reference"] for r in again["references"]} > {
        "joint training"
    }
    assert table(capsys, out, tmp_path / "to", "--set", "base.model=/another")[0] == 3  # nothing is kept of that one

    (out / "inputs.json").write_text(kept.replace('"labels"', '"lables"'))
    code, said = table(capsys, out, tmp_path / "to")
    assert code == 3 and "not what a study keeps of its inputs" in said
    content = json.loads(kept)
    content["labels"] = {t: rows[:-3] for t, rows in content["labels"].items()}
    (out / "inputs.json").write_text(json.dumps(content))
    code, said = table(capsys, out, tmp_path / "to")
    assert code == 3 and str(out / "inputs.json") in said and "digest" in said
    (out / "inputs.json").unlink()
    assert table(capsys, out, tmp_path / "to")[0] == 3
