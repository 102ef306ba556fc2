"""`plait new`, `plait schema`, and recipes as people write them: PEFT's names, one column, everything wrong at once."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from plait.errors import InputError, UsageError
from plait.recipes.other_names import SAME
from plait.recipes.recipe_file import copy_recipe, find_recipe, load_yaml, parse_recipe, read_recipe, shipped_recipes
from plait.recipes.schema import recipe_schema
from plait.runs.fresh import new_recipe, parse_task
from plait.training.settings import TrainingSettings
from tests.command import call, one_object
from tests.conftest import tiny_rows, write_rows
from tests.test_recipe import RAW, described, problem


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Three files: classes by name in csv, pairs in jsonl, fractions in parquet."""
    monkeypatch.chdir(tmp_path)
    rows = [{"review": r["text"], "sentiment": ["bad", "good"][r["label"]]} for r in tiny_rows(2, 60)]
    write_rows(tmp_path / "in" / "reviews.csv", rows)
    write_rows(tmp_path / "in" / "held.csv", rows[:20])
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(3, 60, pair=True))
    write_rows(tmp_path / "grade.parquet", tiny_rows(None, 60))
    return tmp_path


TASKS = ["reviews=in/reviews.csv:review:sentiment", "pairs=pairs.jsonl:text,other", "grade=grade.parquet:text:label"]


def as_options(tasks: list[str]) -> list[str]:
    return [word for t in tasks for word in ("--task", t)]


# --- new --------------------------------------------------------------------------------------------------------------


def test_a_new_recipe_validates_plans_and_runs(capsys, files, tiny_base, monkeypatch):
    base = tiny_base("bert").name
    code, out, _ = call(
        capsys, "new", "my.yaml", "--base", base, *as_options(TASKS), "--validation", "reviews=in/held.csv"
    )
    assert code == 0 and "plait plan my.yaml" in out and "reviews (classification, 60 rows)" in out
    text = Path("my.yaml").read_text()
    assert text.count("#") > 10
    recipe = read_recipe(Path("my.yaml"))
    assert [t.kind for t in recipe.tasks] == ["classification", "classification", "regression"]
    assert recipe.tasks[0].validation == "in/held.csv" and recipe.data.root == str(files)
    assert recipe.lora.target_modules == ["query", "value"]
    assert call(capsys, "validate", "my.yaml")[0] == 0
    code, out, _ = call(capsys, "plan", "my.yaml")
    assert code == 0 and "scored on so many rows: reviews 20, pairs 12, grade 12" in out
    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")  # a recipe names its files whatever folder it is run in
    sets = ["training.epochs=1", "training.lr=0.01", "merges=[tsv]", "arms=[kaiming]"]
    options = [word for s in sets for word in ("--set", s)]
    code, out, _ = call(capsys, "run", "../my.yaml", "--out", "done", "--quiet", *options)
    assert "(kaiming, tsv at scale " in out.splitlines()[-1]
    assert code == 0 and "report.html" in out and Path("done/best/adapter_config.json").is_file()


def test_a_decoder_gets_prompts_and_an_encoder_decoder_too(files, tiny_base):
    for architecture, kind in (("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq")):
        made = new_recipe(Path(f"{architecture}.yaml"), tiny_base(architecture).name, [*map(parse_task, TASKS[:2])])
        assert set(made.tasks.values()) == {kind}
        recipe = read_recipe(Path(f"{architecture}.yaml"))
        assert [t.template for t in recipe.tasks] == ["{review}\nsentiment:", "{text}\n{other}\nlabel:"]
    made = new_recipe(Path("heads.yaml"), tiny_base("llama").name, [*map(parse_task, TASKS)], kind="classification")
    assert made.tasks["reviews"] == "classification"


def test_rows_have_room_for_nearly_all(files, tiny_base):
    made = new_recipe(Path("my.yaml"), tiny_base("roberta").name, [*map(parse_task, TASKS[:2])])
    assert made.max_length % 8 == 0 and 16 <= made.max_length <= 64
    long = [{"text": " ".join(["w1"] * 500), "label": i % 2} for i in range(20)]
    write_rows(files / "long.csv", long)
    made = new_recipe(
        Path("long.yaml"), tiny_base("roberta").name, [parse_task(t) for t in ("a=long.csv:text", TASKS[1])]
    )
    assert made.max_length == 64  # of 66 positions two are before the first word's


def test_names_that_yaml_would_take_for_something_else(files, tiny_base):
    write_rows(files / "odd, name.csv", [{"yes": f"w{i % 9} w2", "no: #": str(i % 2)} for i in range(20)])
    tasks = ["null=odd, name.csv:yes:no: #".replace("no: #", "no"), TASKS[1]]
    write_rows(files / "odd, name.csv", [{"yes": f"w{i % 9} w2", "no": "ab"[i % 2]} for i in range(20)])
    new_recipe(Path("true.yaml"), tiny_base("bert").name, [*map(parse_task, tasks)])
    first = read_recipe(Path("true.yaml")).tasks[0]
    assert (first.name, first.train, first.text, first.label) == ("null", "odd, name.csv", ["yes"], "no")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (TASKS[:1], "two tasks or more"),
        (["x", TASKS[1]], "is not NAME=FILE"),
        (["a=b.csv", TASKS[1]], "is not NAME=FILE"),
        (["a=missing.csv:text", TASKS[1]], "no such file"),
        (["a=pairs.jsonl:txt", TASKS[1]], "no column 'txt'"),
        (["sst2", "a=in/reviews.csv:review:sentiment"], "data.root"),
        ([TASKS[1], TASKS[1]], "collide"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(capsys, files, tiny_base, tasks, message):
    code, _, err = call(capsys, "new", "my.yaml", "--base", tiny_base("bert").name, *as_options(tasks))
    if message == "data.root":  # GLUE beside a file: both are found from anywhere
        assert code == 0 and Path(read_recipe(Path("my.yaml")).tasks[1].train).is_absolute()
        return
    assert code in (2, 3) and message in err and not Path("my.yaml").exists()


def test_only_recipes_are_replaced(capsys, files, tiny_base):
    arguments = ["--base", tiny_base("bert").name, *as_options(TASKS)]
    for _ in range(2):
        assert call(capsys, "new", "my.yaml", "--overwrite", *arguments)[0] == 0
    assert call(capsys, "new", "my.yaml", *arguments)[0] == 2
    Path("other.yaml").write_text("a: 1\n")
    assert call(capsys, "new", "other.yaml", "--overwrite", *arguments)[0] == 2
    assert Path("other.yaml").read_text() == "a: 1\n"
    code, _, err = call(capsys, "new", "my.yml", "--validation", "nobody=x.csv", *arguments)
    assert code == 2 and "no task with a file" in err


# --- schema -----------------------------------------------------------------------------------------------------------


def test_the_schema_takes_what_the_models_take(capsys, tmp_path):
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for path in [*shipped_recipes(), *shipped_recipes("studies")]:
        check.validate(load_yaml(path.read_text(), str(path)))
    check.validate({**RAW, "tasks": [described(text="one", empty="skip"), "rte"]})
    check.validate({**RAW, "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q"]}})
    for wrong in (
        {"merge": ["ties"]},
        {"training": {"stepz": 3}},
        {"training": {"steps": "3"}},
        {"training": {"schedule": "zigzag"}},
        {"lora": {"rank": 8.5, "target_modules": ["q"]}},
        {"arms": [{"name": "a", "training": {"learning": 1}}]},
        {"tasks": [{"name": "a"}]},
    ):
        assert list(check.iter_errors({**RAW, **wrong})), wrong
    code, out, _ = call(capsys, "schema")
    assert code == 0 and json.loads(out) == schema
    assert one_object(call(capsys, "schema", "--json")[1])["recipe"] == schema
    place = tmp_path / "recipe.schema.json"
    for overwrite in ([], ["--overwrite"]):
        assert call(capsys, "schema", "--out", place, *overwrite)[0] == 0
    assert json.loads(place.read_text()) == schema
    place.write_text("{}")
    assert call(capsys, "schema", "--out", place, "--overwrite")[0] == 2


def test_every_training_key_is_described():
    keys = recipe_schema()["properties"]["training"]["properties"]
    assert all(len(entry["description"]) > 8 for entry in keys.values())
    assert {"lr", "steps", "constraint", "learning_rate"} <= keys.keys() and "max_length" not in keys


# --- recipes as people write them -------------------------------------------------------------------------------------


def test_pefts_names_are_understood():
    raw = {
        **RAW,
        "base": {"base_model_name_or_path": "m"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q"]},
        "training": {"learning_rate": 0.1, "max_steps": 5, "lr_scheduler_type": "cosine"},
        "arms": ["kaiming", {"name": "osrm", "training": {"learning_rate": 0.2, "num_train_epochs": 1}}],
    }
    recipe = parse_recipe(raw, "r")
    assert (recipe.base.model, recipe.lora.rank, recipe.lora.alpha) == ("m", 4, 8)
    first, second = (recipe.training_of(a) for a in recipe.arm_specs)
    assert (first.lr, first.steps, first.schedule) == (0.1, 5, "cosine") and (second.lr, second.epochs) == (0.2, 1)
    assert "lora.r and lora.rank are one thing" in problem(lora={"r": 4, "rank": 4, "target_modules": ["q"]})


def test_overrides_take_pefts_names_too(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RAW, "lora": {"rank": 8, "target_modules": ["q"]}}))
    recipe = read_recipe(path, ["lora.r=2", "training.num_train_epochs=1", "training.learning_rate=0.5"])
    assert recipe.lora.rank == 2 and recipe.training == {"epochs": 1, "lr": 0.5}


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"training": {"steps": 1, "per_device_train_batch_size": 8}}, "here it is training.batch_size"),
        ({"lora": {"target_modules": ["q"], "lora_dropout": 0.1}}, "here it is training.dropout"),
        ({"seed": 0}, "here it is seeds"),
        ({"tasks": ["rte", {"name": "a", "train_file": "x", "text": "t"}]}, "here it is train"),
    ],
)
def test_near_names_are_suggested(changed, hint):
    assert hint in problem(**changed)


def test_the_recipes_own_names_are_never_taken_for_others():
    for section, names in SAME.items():
        keys = recipe_schema()["properties"][section]
        own = recipe_schema()["$defs"][keys["$ref"].rpartition("/")[2]]["properties"] if "$ref" in keys else {}
        assert not {ours for ours in names.values() if own and ours not in own}


def test_one_column_may_stand_alone():
    recipe = parse_recipe({**RAW, "tasks": [described(text="review", metrics="accuracy"), "rte"]}, "r")
    assert recipe.tasks[0].text == ["review"] and recipe.tasks[0].metrics == ["accuracy"]


def test_everything_that_is_wrong_is_told_at_once():
    text = problem(
        tasks=["rte", described(metrik="accuracy"), 5],
        arms=["contrastve", {"name": "x", "subspace": "osrm", "training": {"stepz": 4}}],
        merges=["tie", {"name": "ties", "options": {"densty": 1}}],
        training={"epochs": 1, "lrr": 1},
    )
    assert text.startswith("r.yaml: 7 problems: (1) ") and "(7)" in text
    for said in (
        "'metrics'",
        "expected a name, or a mapping (found 5)",
        "'contrastive'",
        "'steps'",
        "'ties'",
        "'density'",
        "'lr'",
    ):
        assert said in text
    text = problem(arms=["contrastve"], merges=["tie"], training={"steps": 1, "lr": -1})
    assert all(said in text for said in ("3 problems", "'contrastive'", "'ties'", "lr is -1"))


def test_many_problems_are_bounded():
    text = problem(**{f"key{i}": 1 for i in range(50)})
    assert "50 problems, the first 8" in text and len(text) < 2000


@pytest.mark.parametrize("name", ["demo", "glue8-minilm", "studies"])
def test_a_folder_hides_no_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    if name == "studies":
        assert find_recipe(Path("studies/glue8-mpnet")).is_file()
        return
    assert find_recipe(Path(name)).name == f"{name}.yaml"
    assert copy_recipe(name, Path("mine.yaml")).is_file()


def test_a_study_is_found_by_its_bare_name():
    assert find_recipe(Path("glue8-mpnet-finalists")).parent.name == "studies"
    assert find_recipe(Path("glue8-minilm")).parent.name != "studies"  # a recipe of that name comes first
    with pytest.raises(InputError):
        read_recipe(find_recipe(Path("glue9")))


def test_a_task_that_is_typed():
    assert parse_task("a=hub:user/set:plain:train:text:gold").train == "hub:user/set:plain:train"
    assert parse_task("a=x.csv:t").label == "label"
    with pytest.raises(UsageError, match="is not NAME=FILE"):
        parse_task("a=hub:user/set:text")


def test_the_schema_is_the_same_where_python_takes_the_indentation_of_docstrings(monkeypatch):
    wanted = recipe_schema()
    monkeypatch.setattr(TrainingSettings, "__doc__", inspect.cleandoc(TrainingSettings.__doc__))  # as Python 3.13 does
    assert recipe_schema() == wanted
