"""Studies of text tasks, whole: a tiny T5 and a tiny Llama, two tasks whose answers are words, no heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from plait.adapters.tensors import read_tensors
from plait.cli import main
from plait.evaluation import fleet
from plait.evaluation.protocol import cross_fitted
from plait.recipes.recipe_file import parse_recipe
from plait.report import write_report
from plait.report.inference import resample
from plait.report.table import rows_of
from plait.runs.layout import Layout
from plait.runs.run import run
from plait.runs.sources import merged_of
from plait.runs.stages import ANSWERS_FILE, scorer_of
from plait.runs.units import FOLDS, MERGE, Unit
from plait.tasks.metrics import MEASURED, open_score
from tests.conftest import tiny_raw, write_rows

ANSWERS = {"topic": ["w0 w3", "w1"], "pairs": ["w0", "w2 w5", "w2 w6 w7"]}
RATE = 0.02


def text_study(base, architecture, kind, root):
    raw = tiny_raw(base, architecture, root, list(ANSWERS))
    for task in raw["tasks"]:
        template = " ".join("{" + c + "}" for c in task["text"])
        task |= {"kind": kind, "labels": ANSWERS[task["name"]], "template": template}
    if kind == "seq2seq":
        raw["lora"]["target_modules"] = r"encoder\..*\.(q|v)"
    raw |= {
        "arms": ["kaiming", {"name": "contrastive", "options": {"rho": 0.1}}],
        "merges": ["task_arithmetic", "regmean"],
        "training": {"steps": 3, "batch_size": 8, "lr": RATE},
        "evaluation": {"scales": [0.5, 1.0], "batch_size": 16},
        "rates": [RATE],
        "tuning_seed": 9,
        "tuning_rows": 4,
        "grid_rows": 4,
        "seeds": [0],
    }
    return parse_recipe(raw, "text")


def open_study(base, root):
    """One task among known answers, one whose answers are open: more of them than a choice is made among."""
    study = text_study(base, "llama", "causal", root)
    rows = [{"text": f"w3 w{i % 60} w{i // 60}", "label": f"w{i % 60} w{i // 60}"} for i in range(230)]
    for split, part in (("train", rows), ("validation", rows[::10])):
        write_rows(root / f"topic.{split}.csv", part)
    raw = study.model_dump(mode="json")
    raw["tasks"][0] |= {"labels": None, "metrics": ["likelihood", "rouge_l"]}
    return parse_recipe(raw | {"arms": raw["arms"][:1], "merges": ["task_arithmetic"]}, "open")


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """finished("llama", "causal") -> the layout of a finished text study."""
    made = {}

    def get(architecture, kind):
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            study = text_study(tiny_base(architecture), architecture, kind, root / "data")
            layout = Layout(study, root / "out")
            assert run(study, layout.out, layout=layout, quiet=True).finished
            made[architecture] = layout
        return made[architecture]

    return get


@pytest.mark.parametrize(("architecture", "kind"), [("t5", "seq2seq"), ("llama", "causal")])
def test_a_text_study_from_its_file_to_its_tables(finished, tmp_path, architecture, kind):
    layout = finished(architecture, kind)
    made = write_report(layout, tmp_path, name="tiny", about={"hardware": "test"})
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert made.rows == len(found["rows"]) == 4
    for row in rows_of(layout):
        assert row.merged == pytest.approx(np.mean(list(row.tasks.values()))) and set(row.tasks) == set(ANSWERS)
    assert len({row["floor"] for row in found["rows"]}) == 1  # the bare base: no head differs
    assert "| `contrastive` |" in (tmp_path / "tiny.md").read_text()


def at_prompt(*arguments):
    """A command that ends well."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code == 0


def test_a_text_study_at_the_prompt(finished, tmp_path, capsys):
    """A file, and the results that are there already: nothing is done twice, the tables come out."""
    layout = finished("llama", "causal")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(layout.recipe.model_dump(mode="json")), encoding="utf-8")
    before = {p: p.stat().st_mtime_ns for p in layout.out.rglob("plait.json")}
    at_prompt("study", "run", path, "--out", layout.out, "--quiet", "--json")
    assert json.loads(capsys.readouterr().out)["finished"]
    assert before and before == {p: p.stat().st_mtime_ns for p in layout.out.rglob("plait.json")}
    at_prompt("study", "table", layout.out, "--to", tmp_path, "--about", "command=of a test")
    listed = capsys.readouterr().out.split()
    assert len(listed) == 6 and all(Path(p).is_file() for p in listed)
    assert "- command: `of a test`" in Path(listed[0]).read_text()


@pytest.mark.parametrize(("architecture", "kind"), [("t5", "seq2seq"), ("llama", "causal")])
def test_what_is_scored_together_is_scored_the_same(finished, monkeypatch, architecture, kind):
    layout, passes = finished(architecture, kind), []
    tree_pass = fleet._tree_pass
    monkeypatch.setattr(fleet, "_tree_pass", lambda *a: (passes.append(a[-1]), tree_pass(*a))[1])
    unit = Unit(MERGE, 0, "kaiming", RATE, merge="regmean", split=FOLDS)
    merged, apart = merged_of(unit, layout).adapter, scorer_of(unit, layout)
    assert not apart.together  # as the CPU likes it
    together = replace(apart, together=True)
    for task, split in apart.splits.items():
        worn, rows = [(merged, 1.0), (None, 0.0), (merged, 0.5)], split.halves["A"]
        for one, other in zip(apart.answers(task, worn, rows), together.answers(task, worn, rows), strict=True):
            np.testing.assert_array_equal(one, other)
    assert max(passes, default=0) == (3 if kind == "causal" else 0)  # all three in one pass, where a tree is followed
    (one, answers), (other, same) = (cross_fitted(s, merged, [0.5, 1.0]) for s in (apart, together))
    assert one == other and all((answers[k] == same[k]).all() for k in answers)


def test_a_study_of_open_answers_keeps_what_was_measured_of_them(tiny_base, tmp_path):
    study = open_study(tiny_base("llama"), tmp_path / "data")
    layout = Layout(study, tmp_path / "out")
    assert run(study, layout.out, layout=layout, quiet=True).finished
    made = write_report(layout, tmp_path, name="tiny")
    (row,) = rows_of(layout)
    unit = Unit(MERGE, 0, "kaiming", RATE, merge="task_arithmetic", split=FOLDS)
    kept, _, _ = read_tensors(layout.path(unit) / ANSWERS_FILE)
    assert kept["topic.A"].shape[1] == len(MEASURED) and kept["pairs.A"].ndim == 1
    both = [
        open_score("likelihood", kept[f"topic.{h}"].numpy(), np.ones((1, len(kept[f"topic.{h}"]))))[0] for h in "AB"
    ]
    rouge = [float(kept[f"topic.{h}"][:, 1].mean()) for h in "AB"]
    assert row.tasks["topic"] == pytest.approx((np.mean(both) + np.mean(rouge)) / 2, abs=1e-4)
    assert made.rows == 1
    drawn = resample(layout, {("kaiming", "it"): dict.fromkeys("AB", "task_arithmetic")}, 20).values["kaiming", "it"]
    assert drawn[0, :, 0] == pytest.approx([row.tasks[t] for t in layout.session.tasks]) and np.ptp(drawn[0, 0]) > 0
