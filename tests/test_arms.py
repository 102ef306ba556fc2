"""Arms that a recipe multiplies: learning rates, snapshots along the way, and moments chosen on rows kept back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.disk.store import read_manifest
from plait.errors import UsageError
from plait.recipes.recipe_file import load_yaml, parse_recipe
from plait.report.line import run
from plait.runs.forecast import describe
from plait.runs.layout import Layout
from plait.runs.session import Session
from plait.runs.single.collect import collect_one
from plait.runs.single.start import StatisticsFiles, initialise_from_files
from plait.runs.sources import adapters_of
from plait.runs.stages import ANSWERS_FILE
from plait.runs.waves import final_units
from plait.subspaces.start import InitialSettings
from tests.conftest import tiny_rows

ONE = {"tasks": ["topic", "grade"], "merges": ["task_arithmetic"]}
TRAINING = {"steps": 4, "batch_size": 8, "lr": 0.02}


def names(recipe):
    return [a.name for a in recipe.arm_specs]


def test_rates_and_snapshots_make_arms(tiny_recipe):
    arms = ["kaiming", {"name": "mine", "subspace": "osrm", "training": {"lr": 0.5, "snapshots": [3]}}]
    recipe = tiny_recipe(arms=arms, training={**TRAINING, "lr": [0.01, 1e-3], "snapshots": [1, 2]})
    of_kaiming = [f"kaiming@lr{r}{s}" for r in ("0.01", "0.001") for s in ("", "@step1", "@step2")]
    assert names(recipe) == [*of_kaiming, "mine", "mine@step3"]
    assert [recipe.training_of(a).lr for a in recipe.arm_specs] == [0.01] * 3 + [0.001] * 3 + [0.5] * 2
    assert all(a.method == ("osrm" if a.name.startswith("mine") else "kaiming") for a in recipe.arm_specs)
    assert names(tiny_recipe(arms=["osrm"], training={**TRAINING, "lr": [0.3]})) == ["osrm"]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr": [0.1, 0.1]}, "stands twice"),
        ({"lr": []}, "lr"),
        ({"lr": [0.1, -1.0]}, r"lr is .*-1"),
        ({"lr": ["fast", "slow"]}, "lr"),
        ({"snapshots": [2, 2]}, "stands twice"),
        ({"snapshots": [0]}, "snapshots"),
        ({"snapshots": 2}, "snapshots"),
    ],
)
def test_what_cannot_be_multiplied_is_named(tiny_recipe, training, message):
    with pytest.raises(UsageError, match=message):
        tiny_recipe(training={**TRAINING, **training})


def test_a_snapshot_after_the_end_is_refused_before_anything_is_computed(tiny_recipe, tmp_path):
    with pytest.raises(UsageError, match="after step 9, and the training has 4"):
        run(tiny_recipe(**ONE, training={**TRAINING, "snapshots": [9]}), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fleet", ["always", "never"])
def test_a_sweep_with_snapshots_walks_the_line(tiny_recipe, tmp_path, fleet):
    training = {**TRAINING, "lr": [0.02, 0.1], "snapshots": [2]}
    recipe, out = tiny_recipe(**ONE, arms=["contrastive"], training=training, fleet=fleet), tmp_path / "out"
    found = run(recipe, out, quiet=True)
    assert list(found["merged"]) == names(recipe)
    assert describe(recipe, out).adapters == 4  # two rates, two tasks; snapshots are not trained
    layout, arms = Layout(recipe, out), {a.name: a for a in recipe.arm_specs}
    units = {u.arm: u for u in final_units(layout)}
    a, b = (adapters_of(units[f"contrastive@lr0.1{s}"], layout)["topic"] for s in ("@step2", ""))
    assert arms["contrastive@lr0.1@step2"].snapshot == 2 and set(a.heads) == set(b.heads) == {"topic"}
    assert not all(torch.equal(a.modules[m].B, b.modules[m].B) for m in a.modules)
    for arm in arms:
        for place in (f"scores/{arm}/seed-0/alone", f"merged/{arm}/seed-0/task_arithmetic"):
            assert read_manifest(out / place)["result"]
    assert run(recipe, out, quiet=True)["units"] == 0
    page = (out / "report/report.html").read_text(encoding="utf-8")
    assert all(arm in page for arm in arms)


def test_a_snapshot_is_the_adapter_of_a_training_that_ends_there(tiny_recipe, tmp_path):
    constant = {**TRAINING, "schedule": "constant"}
    run(tiny_recipe(**ONE, arms=["osrm"], training={**constant, "snapshots": [2]}), tmp_path / "a", quiet=True)
    run(tiny_recipe(**ONE, arms=["osrm"], training={**constant, "steps": 2}), tmp_path / "b", quiet=True)
    snapshot, ended = (
        {
            place: (tmp_path / run_ / place.format(arm) / ANSWERS_FILE).read_bytes()
            for place in ("scores/{}/seed-0/alone", "merged/{}/seed-0/task_arithmetic")
        }
        for run_, arm in (("a", "osrm@step2"), ("b", "osrm"))
    )
    assert snapshot == ended


# --- the best moment --------------------------------------------------------------------------------------------------


def test_selection_rows_are_neither_trained_on_nor_scored(tiny_recipe):
    training = {**TRAINING, "evaluate_every": 2}
    recipe = tiny_recipe(tasks=["topic"], arms=["kaiming"], training=training, data_selection=9)
    session = Session(recipe)
    kept, trained = session.selection("topic", 3), session.training("topic", 3)
    assert len(kept) == 9 and len(trained) == 32 - 9
    assert not set(kept.ids) & set(trained.ids) and sorted({*kept.ids, *trained.ids}) == list(range(32))
    assert not np.array_equal(kept.ids, session.selection("topic", 4).ids)


def test_the_best_moment_goes_down_the_line(tiny_recipe, tmp_path):
    training = {"steps": 12, "batch_size": 8, "lr": 0.05, "evaluate_every": 3, "patience": 2}
    recipe = tiny_recipe(**ONE, arms=["kaiming"], training=training, data_selection=8, fleet="always")
    run(recipe, tmp_path / "out", quiet=True)
    for task in ("topic", "grade"):
        chosen = read_manifest(tmp_path / "out/adapters/kaiming/seed-0" / task)["result"]["selected"]
        scores = dict(chosen["scores"])
        assert chosen["score"] == max(scores.values()) and set(scores) <= {3, 6, 9, 12}
    other = tiny_recipe(**ONE, arms=["kaiming"], training=training, data_selection=7, fleet="always")
    with pytest.raises(UsageError, match="selection"):
        run(other, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(("training", "rows"), [({"evaluate_every": 2}, None), ({}, 5)])
def test_choosing_and_rows_to_choose_by_go_together(tiny_recipe, training, rows):
    with pytest.raises(UsageError, match="give both or neither"):
        tiny_recipe(training={**TRAINING, **training}, data_selection=rows)


def test_too_many_selection_rows(tiny_recipe):
    recipe = tiny_recipe(**ONE, training={**TRAINING, "evaluate_every": 2}, data_selection=32)
    with pytest.raises(UsageError, match="leaves nothing of 32"):
        Session(recipe).training("topic", 0)


def test_one_adapter_by_hand_is_chosen_too(tiny_recipe, tmp_path):
    from plait.runs.single.train import train_one

    recipe = tiny_recipe(**ONE, arms=["kaiming"], training={**TRAINING, "evaluate_every": 2}, data_selection=8)
    start = tmp_path / "start"
    statistics = tmp_path / "topic.stats.safetensors"
    collect_one(recipe, "topic", statistics, seed=0, overwrite=False)
    initialise_from_files(StatisticsFiles(statistics), InitialSettings("kaiming", rank=2), start)
    found = train_one(recipe, start, "topic", tmp_path / "one", seed=0, overwrite=False, quiet=True)
    assert set(dict(found.result["selected"]["scores"])) == {2, 4}


def test_the_recipe_of_the_documentation_says_what_its_page_says():
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    recipe = parse_recipe(load_yaml(text.split("```yaml\n")[1].split("```")[0], "docs"), "docs/tasks.md")
    assert len(recipe.arm_specs) == 4 * 3
    named = [n for n in re.findall(r"`([^`\n]*@[^`\n]*)`", text) if not n.startswith("hub:")]
    assert len(named) == 5 and set(named) <= set(names(recipe))


def data(folder, **rows):
    return {"root": str(folder / "data"), "max_length": 24, "train_rows": 10, **rows}


def texts(examples):
    return [row[0] for row in examples.texts]


def drawn_texts(rows, seed, count):
    """The texts of `count` rows drawn without replacement, in file order."""
    kept = sorted(np.random.default_rng(seed).permutation(len(rows))[:count])
    return [rows[i]["text"] for i in kept]


def test_the_seed_draws_which_rows_are_trained_on_and_counted(tiny_recipe, tmp_path):
    """The rows of `topic` as its file was made: 32 for training (its seed is 1), 24 for validation (0)."""
    session = Session(tiny_recipe(data=data(tmp_path, validation_rows=8), statistics={"samples": 12}))
    rows = {split: tiny_rows(2, n, seed=seed) for split, n, seed in (("train", 32, 1), ("validation", 24, 0))}
    trained = {s: texts(session.training("topic", s)) for s in (0, 1, 2)}
    for seed, found in trained.items():
        assert found == drawn_texts(rows["train"], seed, 10)
        assert texts(session.sample("topic", seed)) == drawn_texts(rows["train"], seed, 12)
    assert len({tuple(t) for t in trained.values()}) == 3
    assert texts(session.validation("topic")) == drawn_texts(rows["validation"], 0, 8)


def test_the_seed_draws_which_rows_are_kept_back(tiny_recipe, tmp_path):
    training = {**TRAINING, "evaluate_every": 2}
    session = Session(tiny_recipe(data=data(tmp_path, selection_rows=6), training=training))
    whole = [r["text"] for r in tiny_rows(2, 32, seed=1)]
    kept = {s: [whole.index(t) for t in texts(session.selection("topic", s))] for s in (0, 1)}
    trained = {s: [whole.index(t) for t in texts(session.training("topic", s))] for s in (0, 1)}
    for seed in (0, 1):
        assert len(kept[seed]) == 6 and len(trained[seed]) == 10 and not {*kept[seed]} & {*trained[seed]}
        assert kept[seed] == sorted(kept[seed]) and trained[seed] == sorted(trained[seed])
    assert kept[0] != kept[1] and trained[0] != trained[1]
