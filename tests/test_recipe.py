"""Recipes: what ships is valid, and every wrong key, name, number and file is named before anything runs."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest
import yaml

from plait.errors import InputError, PlaitError, UsageError
from plait.model.base import load_task_model
from plait.recipes.recipe_file import (
    apply_overrides,
    copy_recipe,
    find_recipe,
    find_study,
    load_yaml,
    parse_recipe,
    read_recipe,
    shipped_recipes,
)
from plait.statistics.targets import find_targets
from plait.tasks import Source, Task

RAW = {
    "base": {"model": "m"},
    "tasks": ["sst2", "rte"],
    "lora": {"target_modules": ["query"]},
    "arms": ["kaiming", "osrm"],
    "training": {"steps": 3},
    "merges": ["ties"],
}


def described(**changed: object) -> dict[str, object]:
    return {"name": "mine", "train": "a.csv", "text": ["text"], **changed}


def problem(**changed: object) -> str:
    with pytest.raises(UsageError) as raised:
        parse_recipe({**RAW, **changed}, "r.yaml")
    assert raised.value.exit_code == 2 and str(raised.value).isprintable()
    return str(raised.value)


# --- good ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_come_back_the_same(path):
    recipe = read_recipe(path)
    assert recipe.name == path.stem and recipe.description
    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe
    assert find_recipe(Path(path.stem)) == path and find_recipe(Path(path.name)) == path
    for arm in recipe.arm_specs:
        assert recipe.training_of(arm).max_length == recipe.data.max_length


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipes_compare_starts_and_show_the_default(path):
    recipe = read_recipe(path)
    arms = {a.name: (a.method, recipe.training_of(a)) for a in recipe.arm_specs}
    method, settings = arms.pop("contrastive_penalised")
    assert (method, settings.constraint, dict(settings.constraint_options)) == ("contrastive", "penalised", {})
    assert {"contrastive", "osrm"} <= set(arms)
    assert all(settings.constraint == "free" and method == name for name, (method, settings) in arms.items())


def test_there_are_shipped_recipes():
    assert {p.stem for p in shipped_recipes()} >= {
        "demo",
        "glue8-minilm",
        "glue8-mpnet",
        "glue8-roberta-large",
        "glue8-t5-large",
        "text3-smollm2",
    }


def test_shipped_studies_are_found_and_valid(tmp_path):
    from plait.cli.catalogue import catalogue
    from plait.recipes.recipe_file import read_recipe

    shipped = shipped_recipes("studies")
    assert [s["name"] for s in catalogue("studies")["studies"]] == [f"studies/{p.stem}" for p in shipped]
    for path in shipped:
        assert find_recipe(Path("studies") / path.stem) == path
        assert (find_recipe(Path(path.stem)) == path) == (path.name not in {p.name for p in shipped_recipes()})
        assert read_recipe(str(path)).name == path.stem
        assert find_study(Path(path.stem)) == find_study(Path("studies") / path.stem) == find_study(path) == path
    assert (
        copy_recipe("studies/glue8-mpnet", tmp_path).read_text() == (shipped[0].parent / "glue8-mpnet.yaml").read_text()
    )


def test_overrides_set_make_and_keep(tmp_path):
    raw = {
        "training": {"steps": 3},
        "tasks": ["sst2", {"name": "own", "text": ["a"]}, {"name": "other", "text": ["a"]}],
    }
    apply_overrides(raw, ['tasks.other.template="{a} is"'])
    assert raw["tasks"][1:] == [{"name": "own", "text": ["a"]}, {"name": "other", "text": ["a"], "template": "{a} is"}]
    apply_overrides(
        raw, ["training.lr=1e-3", "lora.rank=4", "evaluation.scales=[0.5, 1]", "base.model=a=b", "training.lr=2e-3"]
    )
    assert raw["training"] == {"steps": 3, "lr": 2e-3} and raw["lora"]["rank"] == 4
    assert raw["evaluation"]["scales"] == [0.5, 1] and raw["base"]["model"] == "a=b"
    for bad, message in (
        ("x", "not key=value"),
        ("=1", "not key=value"),
        ("tasks.0=rte", "which entry of tasks"),
        ("tasks.sst2.template=x", "sst2 is not a mapping"),
        ("tasks.nobody.template=x", "nobody is not a mapping"),
        ("training.steps.x=1", "steps is not a mapping"),
        ("a=[", "not a recipe"),
    ):
        with pytest.raises(UsageError, match=message):
            apply_overrides(raw, [bad])
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RAW))
    assert read_recipe(path, ["lora.rank=3", "seeds=[1, 2]"]).seeds == [1, 2]


def test_an_arm_overrides_training_and_grids_are_sorted():
    arms = ["kaiming", {"name": "long", "subspace": "osrm", "training": {"epochs": 2, "lr": 0.1}}]
    recipe = parse_recipe({**RAW, "arms": arms, "merges": [{"name": "ties", "scales": [2, 0.5]}, "linear"]}, "r")
    settings = recipe.training_of(recipe.arm_specs[1])
    assert (settings.epochs, settings.steps, settings.lr) == (2, None, 0.1)
    assert recipe.scales_of(recipe.merge_specs[0]) == [0.5, 2] and recipe.scales_of(recipe.merge_specs[1])[0] == 0.3


# --- names: items 33 and 34 -------------------------------------------------------------------------------------------

HOSTILE = ["../x", "/abs", "a/b", "x" * 300, "a\nb", "\x1b[2Jx", "<script>alert(1)</script>", "", ".", "a b"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_of_anything(name):
    for changed in (
        {"tasks": [described(name=name), "rte"]},
        {"arms": [{"name": name, "subspace": "osrm"}]},
        {"merges": [{"name": name, "method": "ties"}]},
        {"name": name},
    ):
        assert "cannot name a folder" in problem(**changed)


@pytest.mark.parametrize(("one", "two"), [("a", "a"), ("RTE", "rte"), ("Größe", unicodedata.normalize("NFD", "größe"))])
def test_names_that_collide(one, two):
    assert "collide" in problem(tasks=[described(name=one), described(name=two)])
    assert "collide" in problem(arms=[{"name": one, "subspace": "osrm"}, {"name": two, "subspace": "kaiming"}])
    assert "collide" in problem(merges=[{"name": one, "method": "ties"}, {"name": two, "method": "linear"}])


def test_names_are_kept_in_one_unicode_form():
    name = unicodedata.normalize("NFD", "Größe")
    found = parse_recipe(
        {**RAW, "tasks": [described(name=name), "rte"], "arms": [{"name": name, "subspace": "osrm"}]}, "r"
    )
    assert found.tasks[0].name == found.arm_specs[0].name == unicodedata.normalize("NFC", name)


# --- keys and values: items 35 and 37 ---------------------------------------------------------------------------------

WRONG = {
    "did you mean 'merges'": {"merge": ["ties"]},
    "did you mean 'target_modules'": {"lora": {"target_module": ["q"], "target_modules": ["q"]}},
    "did you mean 'steps'": {"training": {"stepz": 3}},
    "did you mean 'contrastive'": {"arms": ["contrastve"]},
    "did you mean 'ties'": {"merges": ["tie"]},
    "did you mean 'density'": {"merges": [{"name": "ties", "options": {"densty": 0.2}}]},
    "did you mean 'mnli'": {"tasks": ["mnly"]},
    "did you mean 'accuracy'": {"tasks": [described(metrics=["acuracy"])]},
    "does not score regression": {"tasks": [described(kind="regression", metrics=["accuracy"])]},
    "does not score classification": {"tasks": [described(metrics=["pearson"])]},
    "Field required": {"base": {}},
    "at least 1 item": {"tasks": []},
    "looks at the other tasks": {"tasks": ["rte"]},
    "exactly one of steps and epochs": {"training": {}},
    "merge 'mats' needs output gradients (statistics: {output_gradients: true})": {"merges": ["mats"]},
    "merge 'fisher' needs Fisher files, which runs do not collect": {"merges": ["fisher"]},
    "with output_gradients use sketch": {"statistics": {"output_gradients": True, "memory": "1GB"}},
    "lr is -1": {"training": {"steps": 1, "lr": -1}},
    "batch_size is 1000000000, expected an integer of at most 65536": {"training": {"steps": 1, "batch_size": 10**9}},
    "steps is 1000000001, expected an integer of at most 1000000000": {"training": {"steps": 10**9 + 1}},
    "epochs is 1000001, expected a number of at most 1000000": {"training": {"epochs": 10**6 + 1}},
    "seed 0 stands twice": {"seeds": [1, 0, 0]},
    "cannot be called 'alone'": {"merges": [{"name": "alone", "method": "ties"}]},
    "less than or equal to 4096": {"lora": {"rank": 10**9, "target_modules": ["q"]}},
    "valid integer": {"lora": {"rank": 8.5, "target_modules": ["q"]}},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_keys_and_values(message):
    assert message in problem(**WRONG[message])


@pytest.mark.parametrize("grid", [[], [float("nan")], [float("inf")], [-1], [0], ["x"], [0.5, 0.5], 0.5, [1.0] * 300])
def test_bad_scale_grids(grid):
    assert "scales" in problem(evaluation={"scales": grid})
    assert "scales" in problem(merges=[{"name": "ties", "scales": grid}])


def test_all_problems_are_told_at_once():
    text = problem(base={"model": ""}, seeds=[-1], evaluation={"resamples": -1})
    assert all(key in text for key in ("base.model", "seeds", "evaluation.resamples"))


# --- files: item 35 ---------------------------------------------------------------------------------------------------

YAML = {
    "stands twice": "a: 1\nb: 2\na: 3\n",
    "stands twice ": "a: {x: 1, x: 2}",
    "cannot start any token": "a:\n\tb: 1\n",
    "aliases": "a: &x [1]\nb: *x\n",
    "aliases ": "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "could not determine a constructor": "a: !!python/object/apply:os.system ['true']",
    "could not determine a constructor ": "a: !!python/name:os.system",
    "unacceptable character": "a: \x00",
    "not a recipe": "a: [",
    "not a recipe ": "[" * 5000,
    "not a recipe  ": "a: 2020-99-99",
}


@pytest.mark.parametrize("message", YAML)
def test_hostile_yaml(message):
    with pytest.raises(UsageError, match=message.strip()) as raised:
        load_yaml(YAML[message], "r.yaml")
    assert str(raised.value).isprintable() and "r.yaml" in str(raised.value)


def test_many_keys_take_no_quadratic_time():
    text = "\n".join(f"k{i}: 1" for i in range(20_000))
    started = time.process_time()
    assert len(load_yaml(text, "r")) == 20_000
    assert time.process_time() - started < 20


def test_numbers_are_numbers():
    assert load_yaml("{a: 1e-3, b: 1E5, c: -2e+1, d: 0x10, e: 'x'}", "r") == {
        "a": 1e-3,
        "b": 1e5,
        "c": -20.0,
        "d": 16,
        "e": "x",
    }


def test_files_that_are_no_recipes(tmp_path):
    files = {
        "list.yaml": b"[1]",
        "latin.yaml": b"name: caf\xe9",
        "large.yaml": b" " * (1 << 20) + b"a: 1",
        "empty.yaml": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PlaitError) as raised:
            read_recipe(tmp_path / name)
        assert name in str(raised.value) and raised.value.exit_code in (2, 3)
    with pytest.raises(InputError, match="no such recipe") as raised:
        read_recipe(tmp_path / "glue8-minlm.yaml")
    assert "glue8-minilm" in str(raised.value.hint)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(RAW).encode().replace(b"\n", b"\r\n"))
    assert read_recipe(tmp_path / "bom.yaml").tasks == ["sst2", "rte"]


# --- target modules: item 36 ------------------------------------------------------------------------------------------

TARGETS = {"(": "not a regular expression", "qeury": "near: .*query", "": "empty"}


@pytest.mark.parametrize("pattern", TARGETS)
def test_bad_target_modules(tiny_base, pattern):
    task = Task("t", "classification", Source("none"), ("text",), labels=("a", "b"))
    model = load_task_model(tiny_base("bert"), task, seed=0)
    for given in (pattern, [pattern]) if pattern == "qeury" else (pattern,):
        with pytest.raises(UsageError, match=TARGETS[pattern]):
            find_targets(model, given)


@pytest.mark.slow
def test_an_endless_regex_ends(tiny_base):
    task = Task("t", "classification", Source("none"), ("text",), labels=("a", "b"))
    model = load_task_model(tiny_base("bert"), task, seed=0)
    started = time.monotonic()
    with pytest.raises(UsageError, match="target_modules"):
        find_targets(model, r"(([a-z]+\.?)+)+[0-9]!")
    assert time.monotonic() - started < 60
