"""Tables and figures of a study: what they agree on, and what they say where nothing was learned."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from plait.cli import main
from plait.errors import RunError, UsageError
from plait.report.best import best_rows
from plait.report.figures import figures_of
from plait.report.inference import NOTHING_LEARNED
from plait.report.study_page import linked
from plait.report.table import rows_of
from plait.report.write import write_tables
from plait.runs.journal import about_runs, noted
from plait.runs.layout import Layout
from plait.runs.run import run
from plait.runs.units import FEATURES, FOLDS, MERGE, STATISTICS
from plait.runs.waves import all_units, next_wave
from tests.conftest import tiny_rows


def tables_of(study, folder):
    """A study done and reduced: its layout, its JSON, its page, the paths that were made."""
    layout = Layout(study, folder / "out")
    assert run(study, layout.out, layout=layout, quiet=True).finished
    made = write_tables(layout, folder, about={"command": "of a test"})
    return layout, json.loads(Path(made["json"]).read_text()), Path(made["markdown"]).read_text(), made


def small(**changed):
    """Two arms, no references or ablations."""
    return {"arms": ["kaiming", "orthonormal"], "repair": None, "variants": [], "rates": [0.03], **changed}


def test_tables_and_figures_tell_the_same(small_study, tmp_path):
    layout, found, page, made = tables_of(small_study(**small(seeds=[0, 1])), tmp_path)
    assert found["undefined"] == [] and "Not defined" not in page
    assert f"{os.cpu_count()} CPU cores" in found["about"]["hardware"] and "- command: `of a test`" in page
    assert found["about"]["executor"] == "InProcess (1 training, 1 scoring)"
    rows = rows_of(layout)
    curves = {(c["arm"], c["merge"]): dict(c["points"]) for c in found["scales"]}
    compared = 0
    for b in best_rows(rows):
        low, high = next(x["interval"] for x in found["best"] if x["arm"] == b.arm)
        assert low <= high and f"{100 * low:.0f} to {100 * high:.0f}" in page
        assert b.merged == pytest.approx(
            [np.mean([r.by_half[h] for r in rows for h in "AB" if (r.arm, r.method, r.seed) == (b.arm, b.merges[h], s)])
             for s in b.seeds]
        )  # fmt: skip
        for merge in ("best", "task_arithmetic", "regmean"):
            assert curves[b.arm, merge][1.0] == 0.0
        for multiple, regret in ((0.5, b.regret_half), (2.0, b.regret_double)):
            if (found_there := curves[b.arm, "best"].get(multiple)) is not None:
                assert found_there == pytest.approx(-regret, abs=1e-4)
                compared += 1
    assert compared > 0
    assert len(made["figures"]) == 3
    for path in map(Path, made["figures"]):
        assert f"]({path.name})" in page and ET.parse(path).getroot().tag.endswith("svg")
    assert figures_of(found, "kaiming") == figures_of(found, "kaiming")  # bytes, so that a page can be made again
    texts = Path(made["figures"][0]).read_text()
    assert ">orthonormal<" in texts and ">recovered, %<" in texts


def test_what_only_predictors_read_may_be_missing(small_study, tmp_path):
    layout, found, _, _ = tables_of(small_study(**small(seeds=[0])), tmp_path)
    units = all_units(layout)
    for room in ("train", "statistics"):  # read by nobody any more
        shutil.rmtree(layout.out / room)
    assert next_wave(Layout(layout.study, layout.out)) == ("", [])
    shutil.rmtree(layout.path(next(u for u in units if u.stage == FEATURES and u.arm == "orthonormal")))
    again = Layout(layout.study, layout.out)
    name, todo = next_wave(again)
    assert name == "statistics" and {u.stage for u in todo} == {STATISTICS}
    fewer = json.loads(Path(write_tables(again, tmp_path, about={})["json"]).read_text())
    assert [p["n"] for p in fewer["predictors"]] == [p["n"] // 2 for p in found["predictors"]]
    assert fewer["rows"] == found["rows"] and fewer["comparisons"] == found["comparisons"]
    shutil.rmtree(layout.path(next(u for u in units if u.stage == MERGE and u.split == FOLDS)))
    with pytest.raises(RunError, match="not finished: 1 units of wave 'scores'"):
        write_tables(Layout(layout.study, layout.out), tmp_path, about={})
    layout = Layout(layout.study, layout.out)
    assert run(layout.study, layout.out, layout=layout, quiet=True).finished
    kept = [r for r in (layout.out / "train").iterdir() if r.is_dir()]
    assert len(kept) == 2  # the two arms of which a score was open, at the rate that was chosen; no sweep
    assert json.loads(Path(write_tables(layout, tmp_path, about={})["json"]).read_text())["rows"] == found["rows"]


def test_where_nothing_was_learned_recovered_is_null_and_why_is_said(small_study, tmp_path):
    layout, found, page, made = tables_of(small_study(**small(rates=[1e-9], seeds=[0])), tmp_path)
    assert all(r["recovered"] is None and r["merged"] > 0 for r in found["rows"])
    assert found["undefined"] and found["undefined"][0].startswith("Seed 0: adapters alone reach")
    assert found["undefined"][0] in page and NOTHING_LEARNED in page and "nan" not in page
    for c in found["comparisons"]:
        assert c["undefined"] == NOTHING_LEARNED and c["difference"] is c["p"] is c["equivalent"] is None
    assert all(b["interval"] is None for b in found["best"])
    assert all(r["recovered"] is None and r["score"] > 0 for r in found["references"])
    assert ">merged, mean score, %<" in Path(made["figures"][0]).read_text()
    with pytest.raises(UsageError, match="unknown arm"):
        write_tables(layout, tmp_path, about={}, against="nobody")


def test_tables_need_neither_the_base_nor_the_data(small_study, tmp_path, capsys):
    """Where all scores are there: what a published archive is."""
    root, out = tmp_path / "data", tmp_path / "out"
    base = shutil.copytree(small_study().base.model, tmp_path / "base")
    study = small_study(
        seeds=[0], base={"model": str(base), "device": "cpu"}, description="See docs/study/protocol.md."
    )
    layout = Layout(study, out)
    assert run(study, out, layout=layout, quiet=True).finished
    before = json.loads(Path(write_tables(layout, tmp_path, about={})["json"]).read_text())
    kept = (out / "inputs.json").read_text()
    assert str(tmp_path) not in kept and tiny_rows(2, 24)[0]["text"] not in kept  # neither folders nor texts
    for room in (root, base, out / "train", out / "statistics", out / "repair"):
        shutil.rmtree(room)
    (tmp_path / "docs" / "study").mkdir(parents=True)
    (tmp_path / "docs" / "study" / "protocol.md").touch()
    to = tmp_path / "docs" / "results"

    def table(*more):
        with pytest.raises(SystemExit) as ended:
            main(["study", "table", str(out), "--to", str(to), *more])
        return ended.value.code, capsys.readouterr().err

    capsys.readouterr()  # what saving the base said, where this test is the first to need it
    assert table() == (0, "")
    again = json.loads((to / "tiny.json").read_text())
    assert again["rows"] == before["rows"] and again["comparisons"] == before["comparisons"]
    assert any(r["variant"] for r in again["rows"]) and again["best"] == before["best"]
    page = (to / "tiny.md").read_text()
    assert "See [docs/study/protocol.md](../study/protocol.md)." in page
    assert table("--set", "base.model=/another")[0] == 3  # of which the folder says nothing: it is looked for
    (out / "inputs.json").write_text(kept.replace('"labels"', '"lables"'))
    code, said = table()
    assert code == 3 and "not what a study keeps of its inputs" in said
    content = json.loads(kept)
    content["labels"] = {t: rows[:-3] for t, rows in content["labels"].items()}
    (out / "inputs.json").write_text(json.dumps(content))
    code, said = table()
    assert code == 3 and str(out / "inputs.json") in said and "digest" in said
    (out / "inputs.json").unlink()
    assert table()[0] == 3


def test_pages_that_are_not_near_stay_words(tmp_path):
    assert linked("See docs/study/protocol.md.", tmp_path) == "See docs/study/protocol.md."


def test_runs_are_noted_also_where_they_fail(tmp_path):
    assert about_runs(tmp_path) == {}
    with noted(tmp_path, "cpu", "Processes", 1, 3):
        pass
    with pytest.raises(RunError), noted(tmp_path, "cpu", "Processes", 1, 3):
        raise RunError("lost")
    said = about_runs(tmp_path)
    assert said["seconds"] == "0 in 2 runs" and said["executor"] == "Processes (1 training, 3 scoring)"
    with noted(tmp_path, "cpu", "RayCluster", 2, 2):
        pass
    assert "a Ray cluster" in about_runs(tmp_path)["hardware"]


@pytest.mark.slow
def test_the_published_archive_gives_the_published_numbers(tmp_path, capsys):
    results = Path(__file__).parents[2] / "docs" / "results"
    for archive in results.glob("*.tar.xz"):
        with tarfile.open(archive) as packed:
            packed.extractall(tmp_path, filter="data")
        name = archive.name.removesuffix(".tar.xz")
        with pytest.raises(SystemExit) as ended:
            main(["study", "table", str(tmp_path / name), "--to", str(tmp_path)])
        assert ended.value.code == 0, capsys.readouterr().err
        found, published = (json.loads((f / f"{name}.json").read_text()) for f in (tmp_path, results))
        for key in ("rows", "best", "references", "sweep", "comparisons", "predictors"):
            assert found[key] == published[key], key
