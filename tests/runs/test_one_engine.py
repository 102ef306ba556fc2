"""One engine for whatever is run: the same results by every command and executor, and only what is missing is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from plait.cli import main
from plait.errors import PlaitError, UsageError
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import run
from plait.runs import stages
from plait.runs.executors import Processes, batch_of, run_batch
from plait.runs.forecast import describe
from plait.runs.layout import Layout
from plait.runs.run import planned, write_jobs
from plait.runs.run import run as run_units
from plait.runs.stages import ANSWERS_FILE

TWO = {"tasks": ["topic", "grade"], "arms": ["kaiming", "osrm"], "merges": ["task_arithmetic"]}


def results(out: Path) -> dict[str, bytes]:
    """Every adapter and every answer of a run."""
    files = [*out.rglob("adapter_model.safetensors"), *out.rglob(ANSWERS_FILE)]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def test_run_and_study_run_give_the_same(tiny_recipe, tmp_path, capsys):
    recipe = tiny_recipe(**TWO)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    for command in (["run"], ["study", "run"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(file), "--out", str(tmp_path / command[0]), "--quiet", "--json"])
        assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["reused"] == 0
    assert results(tmp_path / "run") == results(tmp_path / "study") != {}


def test_processes_leave_what_this_process_leaves(tiny_recipe, tmp_path):
    recipe = tiny_recipe(**TWO)
    workers = Processes(2)
    try:
        assert run_units(recipe, tmp_path / "apart", executor=workers, quiet=True).finished
    finally:
        workers.close()
    assert run_units(recipe, tmp_path / "here", quiet=True).finished
    assert results(tmp_path / "apart") == results(tmp_path / "here") != {}


def test_an_arm_added_later_only_adds(tiny_recipe, tmp_path):
    first = run(tiny_recipe(**{**TWO, "arms": ["osrm"]}), tmp_path / "out", quiet=True)
    before = results(tmp_path / "out")
    both = run(tiny_recipe(**TWO), tmp_path / "out", quiet=True)
    assert both["reused"] == first["units"] and set(both["merged"]) == {"kaiming", "osrm"}
    assert both["merged"]["osrm"] == first["merged"]["osrm"]
    after = results(tmp_path / "out")
    assert {k: v for k, v in after.items() if k in before and not k.startswith("best")} == {
        k: v for k, v in before.items() if not k.startswith("best")
    }


def test_interrupted_statistics_keep_the_tasks_that_are_done(tiny_recipe, tmp_path, monkeypatch):
    recipe, collect, asked = tiny_recipe(**TWO), stages.collect_file, []

    def interrupted(session, name, path, **options):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        collect(session, name, path, **options)

    monkeypatch.setattr(stages, "collect_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_units(recipe, tmp_path / "out", quiet=True)
    run_units(recipe, tmp_path / "out", quiet=True)
    assert asked == ["topic", "grade", "grade"]
    assert not list((tmp_path / "out/statistics").glob(".*"))


def test_a_plain_recipe_may_have_what_a_study_has(tiny_recipe, tmp_path):
    joint = {"name": "joint", "subspace": "kaiming", "joint": True}
    variant = {"name": "rank3", "set": {"lora.rank": 3}, "arms": ["osrm"]}
    recipe = tiny_recipe(**{**TWO, "arms": ["kaiming", "osrm", joint]})
    recipe = parse_recipe({**recipe.model_dump(mode="json"), "variants": [variant]}, "tiny")
    forecast = describe(recipe, tmp_path / "out")
    assert forecast.stages["train"].units == 4 and not forecast.tuned
    outcome = run_units(recipe, tmp_path / "out", quiet=True)
    assert outcome.finished and outcome.done == sum(s.units for s in forecast.stages.values())
    assert (tmp_path / "out/variants/rank3/merged/osrm/seed-0/task_arithmetic").is_dir()
    assert (tmp_path / "out/scores/joint/seed-0/alone").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": [2]}, "no rates to choose from"),
        ({"arms": [{"name": "kaiming", "rates": [0.1]}]}, "the recipe has none"),
        ({"rates": [0.1], "training": {"steps": 4, "lr": [0.1, 0.2]}}, "training.lr is a list"),
        ({"rates": [0.1], "seeds": [1000]}, "tuning seed"),
        ({"arms": [{"name": "early", "snapshot": 2}]}, "another arm's training"),
    ],
)
def test_what_belongs_to_a_sweep_is_told_apart(tiny_recipe, tmp_path, changes, message):
    raw = {**tiny_recipe(**TWO).model_dump(mode="json"), **changes}
    with pytest.raises(UsageError, match=message):
        parse_recipe(raw, "tiny")


def test_units_of_a_plain_recipe_have_places_of_their_own(tiny_recipe, tmp_path):
    recipe = tiny_recipe(**TWO)
    recipe = parse_recipe({**recipe.model_dump(mode="json"), "seeds": [0, 1]}, "tiny")
    layout = Layout(recipe, tmp_path)
    units = planned(layout)
    assert len({layout.path(u) for u in units}) == len(units) == 2 * (1 + 2 * 4)


@pytest.mark.parametrize("grid_rows", [400, 5])
def test_what_is_reported_is_what_the_grid_answered_where_it_saw_all_rows(
    tiny_recipe, tmp_path, monkeypatch, grid_rows
):
    from plait.adapters.tensors import read_tensors
    from plait.disk.store import read_manifest
    from plait.evaluation.protocol import Scorer

    asked, answers = [], Scorer.answers
    monkeypatch.setattr(
        Scorer, "answers", lambda s, task, each, rows: asked.append(len(rows)) or answers(s, task, each, rows)
    )
    recipe = tiny_recipe(**{**TWO, "arms": ["osrm"]})
    recipe = parse_recipe({**recipe.model_dump(mode="json"), "grid_rows": grid_rows}, "tiny")
    run_units(recipe, tmp_path / "out", quiet=True)
    merged = tmp_path / "out/merged/osrm/seed-0/task_arithmetic"
    tensors = read_tensors(merged / ANSWERS_FILE)[0]
    assert {k: len(v) for k, v in tensors.items()} == {f"{t}.{h}": 12 for t in ("topic", "grade") for h in "AB"}
    halves = read_manifest(merged)["result"]["halves"]
    assert set(halves["A"]["score"]) == {"topic", "grade"}
    alone = 2 * 2  # each adapter and the floor, half by half
    assert len(asked) - alone == (2 if grid_rows == 400 else 2 + 2 * len({h["scale"] for h in halves.values()}))


def test_plan_of_a_study_tells_its_sweep_then_what_it_chose(tiny_recipe, tmp_path):
    raw = tiny_recipe(**TWO).model_dump(mode="json") | {"rates": [0.01, 0.03], "tuning_rows": 6}
    study = parse_recipe(raw, "tiny")
    sweep = describe(study, tmp_path / "out")
    assert sweep.tuned and sweep.adapters == 2 * 2 * 2 and {s: c.units for s, c in sweep.stages.items()} == {
        "statistics": 1, "train": 4, "alone": 4, "merge": 4,
    }  # fmt: skip
    run_units(study, tmp_path / "out", quiet=True)
    after = describe(study, tmp_path / "out")
    assert after.stages["features"].units == 2 and all(c.units == c.reused for c in after.stages.values())


def test_single_files_that_a_kill_has_left_are_cleared(tiny_recipe, tmp_path):
    from plait.runs.stages import parts_of
    from plait.runs.units import STATISTICS, Unit

    recipe, out = tiny_recipe(**{**TWO, "arms": ["osrm"]}), tmp_path / "out"
    run_units(recipe, out, quiet=True)
    layout = Layout(recipe, out)
    left = parts_of(
        Unit(STATISTICS, 0, pool="token", samples=16), layout
    )  # between the unit's rename and their removal
    left.mkdir()
    (left / "topic.stats.safetensors").write_bytes(b"")
    shutil.rmtree(out / "scores")
    run_units(recipe, out, quiet=True)
    assert not left.exists()


@pytest.mark.parametrize(
    "place", ["adapters/osrm/seed-0/topic/adapter_model.safetensors", "scores/osrm/seed-0/alone/answers.safetensors"]
)
def test_damage_in_an_ablation_is_mended_too(tiny_recipe, tmp_path, capsys, place):
    variant = {"name": "rank3", "set": {"lora.rank": 3}, "arms": ["osrm"]}
    raw = tiny_recipe(**{**TWO, "arms": ["osrm"]}).model_dump(mode="json") | {"variants": [variant]}
    recipe, out = parse_recipe(raw, "tiny"), tmp_path / "out"
    run_units(recipe, out, quiet=True)
    before, file = results(out), out / "variants/rank3" / place
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    outcome = run_units(recipe, out, quiet=True)
    assert outcome.finished and outcome.done == 1 and "done again: " in capsys.readouterr().err
    assert results(out) == before


@pytest.mark.parametrize("way", ["run", "job list", "job run"])
def test_what_lies_in_a_folder_that_is_no_run_is_somebody_else_s(tiny_recipe, tmp_path, way):
    recipe, out = tiny_recipe(**TWO), tmp_path / "home"
    thesis = out / "statistics/seed-0/thesis"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years")
    ways = {
        "run": lambda: run_units(recipe, out, quiet=True),
        "job list": lambda: write_jobs(recipe, out, tmp_path / "jobs", 1),
        "job run": lambda: run_batch(
            batch_of(Layout(recipe, out), planned(Layout(recipe, tmp_path / "elsewhere"))[:1])
        ),
    }
    with pytest.raises(PlaitError, match="not finished by plait"):
        ways[way]()
    assert thesis.read_text() == "years" and list(out.iterdir()) == [out / "statistics"]
