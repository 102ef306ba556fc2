"""The smallest study, whole: waves, cross-fitted scores, references, an ablation, tables; gone on with, not redone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from plait.disk.store import read_manifest
from plait.errors import InputError, UsageError
from plait.evaluation.splits import split_rows
from plait.recipes.recipe_file import parse_recipe, read_recipe
from plait.report import write_report
from plait.report.table import rows_of
from plait.runs import stages
from plait.runs.layout import Layout
from plait.runs.run import parts, run
from plait.runs.sources import adapters_of
from plait.runs.units import MERGE
from plait.runs.waves import final_units, next_wave, repair_units, sweep_units, tuning_scores


def test_a_study_from_its_file_to_its_tables(small_study, tmp_path):
    study, out = small_study(), tmp_path / "out"
    layout = Layout(study, out)
    done = run(study, out, layout=layout, quiet=True)
    assert done.finished and next_wave(Layout(study, out)) == ("", [])
    made = write_report(layout, tmp_path, name="tiny", about={"hardware": "test"})
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert made.rows == len(found["rows"]) == 13  # 3 arms x 2 merges x 2 seeds, and the ablation
    for row in rows_of(layout):
        assert row.recovered == pytest.approx((row.merged - row.floor) / (row.plain - row.floor))
        assert row.merged == pytest.approx(np.mean(list(row.tasks.values())))
    assert {r["reference"] for r in found["references"]} >= {
        "served separately",
        "joint training",
        "best single adapter",
    }
    repaired = [r for r in found["references"] if r["reference"].endswith(" and repair")]
    assert (
        len(repaired) == len(repair_units(layout)) > 0
    )  # a merge that was trained further is measured beside the others
    assert {(r["arm"], r["seed"]) for r in repaired} == {(u.arm, u.seed) for u in repair_units(layout)}
    assert "| `contrastive` |" in (tmp_path / "tiny.md").read_text()
    fleets = {u.variant: fleet_of(layout, u) for u in final_units(layout) if u.arm == "contrastive"}
    assert fleets["rank4"] == fleets[""] >= 10  # an ablation's adapters are trained in the fleet of the main arms
    joint = next(u for u in sweep_units(layout) if u.arm == "joint")
    one, other = adapters_of(joint, layout).values()
    assert all((one.modules[m].B == other.modules[m].B).all() for m in one.modules) and repair_units(layout)


def fleet_of(layout, unit):
    """How many adapters a unit's were trained together with."""
    here = layout.of(unit)
    (size,) = {read_manifest(here.path(here.trained_by(unit)) / t)["result"]["fleet"] for t in here.session.tasks}
    return size


def test_rows_of_a_split_are_disjoint_and_complete():
    split = split_rows(103, seed=0, tuning_rows=250, grid_rows=10)
    whole = np.concatenate([split.tuning, *split.halves.values()])
    assert sorted(whole) == list(range(103)) and len(split.tuning) == 20
    assert all(len(g) == 10 and set(g) <= set(split.halves[h]) for h, g in split.grid.items())


def test_batches_keep_everything_once_and_wrong_studies_are_refused(small_study, tmp_path):
    study = small_study()
    units = sweep_units(Layout(study, tmp_path))
    dealt = parts(units, 2)
    assert len(dealt) == 2 and sorted(u.label for p in dealt for u in p) == sorted(u.label for u in units)
    for text, message in ((b"name: caf\xe9", "not UTF-8 at byte 9"), (b" " * (1 << 20) + b"a: 1", "over 1 MiB")):
        (tmp_path / "study.yaml").write_bytes(text)
        with pytest.raises(InputError, match=message):
            read_recipe(tmp_path / "study.yaml")
    raw = study.model_dump(mode="json")
    with pytest.raises(UsageError, match="no arm"):
        parse_recipe({**raw, "repair": {"arms": ["nobody"], "merge": "regmean"}}, "x")
    with pytest.raises(UsageError, match="tuning seed"):
        parse_recipe({**raw, "tuning_seed": 0}, "x")


def test_the_base_is_loaded_before_merges_are_computed_beside(small_study, tmp_path, monkeypatch):
    """While it loads, transformers sets torch's default dtype, for a thread that merges too."""
    layout, seen = Layout(small_study(), tmp_path), []
    monkeypatch.setattr(stages, "merged_of", lambda _, here: seen.append(here.session.evaluator.models.loaded))
    monkeypatch.setattr(stages, "_one", lambda unit, here, future: future.result() if future else None)
    units = [u for train in sweep_units(layout) for u in tuning_scores(layout, train)]
    assert stages.do(units, layout) == len(units)
    assert seen == [True] * sum(u.stage == MERGE for u in units) and seen
