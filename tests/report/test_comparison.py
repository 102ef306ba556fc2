"""Two runs side by side: the differences of their rows, paired where they scored the same rows, and what was set otherwise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from plait.cli import main
from plait.errors import UsageError
from plait.report.comparison import BEST, compare_runs, same_labels
from plait.report.comparison_page import write_comparison
from plait.report.table import rows_of
from plait.tasks import Source, Task
from tests.report.conftest import Page, finished, small
from tests.study.conftest import raw_study


@pytest.fixture(scope="module")
def other_done(study_done, tiny_base, tmp_path_factory):
    """A run of the same rows with one seed, one arm less and another rank."""
    from plait.recipes.recipe_file import parse_recipe

    root = tmp_path_factory.mktemp("other")
    raw = raw_study(tiny_base("bert"), root / "data") | small(arms=["kaiming"], seeds=[0])
    raw["lora"] = {**raw["lora"], "rank": 1}
    return finished(parse_recipe(raw, "other"), root / "out")


def test_a_run_against_itself_has_no_differences(study_done, tmp_path):
    copy = shutil.copytree(study_done.out, tmp_path / "copy")
    compared = compare_runs(study_done.out, copy)
    assert compared.paired and not compared.settings and not compared.missing
    keys = {(r.arm, r.method) for r in rows_of(study_done)}
    assert {(c.arm, c.merge) for c in compared.changes} == keys | {(BEST, BEST)}
    for c in compared.changes:
        assert c.difference == 0 and c.interval == (0, 0) and set(c.tasks.values()) == {0}


def test_rows_of_written_answers_are_the_same_where_their_files_are():
    def run(digest, answers=None, right=(-1, -1)):  # of an open answer nothing but -1 is kept
        task = Task("t", "causal", Source("t.csv"), ("text",), labels=answers)
        source = {"source": {"train": f"t.csv:{digest}", "validation": None}}
        return SimpleNamespace(tasks={"t": task}, data={"t": source}, labels=lambda _: np.array(right))

    assert same_labels(run("a"), run("a"), "t") and not same_labels(run("a"), run("b"), "t")
    chosen = run("a", ("no", "yes"), (0, 1))
    assert same_labels(chosen, run("b", ("no", "yes"), (0, 1)), "t")
    assert not same_labels(chosen, run("a", ("no", "yes"), (1, 1)), "t")


def test_differences_are_those_of_the_rows(study_done, other_done):
    compared = compare_runs(study_done.out, other_done.out)
    assert not compared.paired  # other seeds
    means = []
    for layout in (study_done, other_done):
        rows = [r for r in rows_of(layout) if (r.arm, r.method) == ("kaiming", "regmean")]
        means.append({t: np.mean([r.tasks[t] for r in rows]) for t in compared.tasks})
    (change,) = [c for c in compared.changes if (c.arm, c.merge) == ("kaiming", "regmean")]
    for task in compared.tasks:
        assert change.tasks[task] == pytest.approx(means[1][task] - means[0][task])
    assert change.first == pytest.approx(np.mean(list(means[0].values())))
    assert change.difference == pytest.approx(change.second - change.first)
    low, high = change.interval
    assert low < high and low <= change.difference <= high
    assert compared.settings["lora.rank"][1] == 1 and compared.settings["seeds"] == ([0, 1], [0])
    assert compared.missing == ["Only in A: arms `orthonormal`."]


def test_the_page_is_self_contained_and_names_no_folder_of_whoever_ran_them(study_done, other_done, tmp_path, capsys):
    _, paths = write_comparison(study_done.out, other_done.out, tmp_path / "page")
    for path in paths.values():
        text = Path(path).read_text("utf-8")
        assert str(study_done.out.parent) not in text and str(other_done.out.parent) not in text
    page = Path(paths["html"]).read_text("utf-8")
    assert Page(page).fetched == [] and re.findall(r'<h2 id="s\d">(.*?)</h2>', page) == [
        "The best of each", "By task", "What was set otherwise",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["report", str(study_done.out), str(other_done.out), "--to", str(tmp_path / "again"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and said["changes"][0]["merge"] == BEST and not said["paired"]


def test_runs_without_a_task_in_common_are_refused(study_done, tiny_base, tmp_path, monkeypatch):
    from plait.report import comparison
    from plait.runs.folder import layout_of_folder

    layouts = [layout_of_folder(study_done.out) for _ in range(2)]
    order = iter(layouts)
    monkeypatch.setattr(type(layouts[1]), "tasks", property(lambda self: {} if self is layouts[1] else {"topic": None}))
    monkeypatch.setattr(comparison, "layout_of_folder", lambda _: next(order))
    monkeypatch.setattr(comparison, "rows_of", lambda _: [])
    with pytest.raises(UsageError, match="no task in common"):
        compare_runs(study_done.out, study_done.out)


def test_three_runs_are_too_many(study_done, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", *[str(study_done.out)] * 3])
    assert ended.value.code == 2 and "one, or two to compare" in capsys.readouterr().err
