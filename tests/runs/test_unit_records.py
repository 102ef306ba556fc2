"""What units leave is read back with types and ranges: an edited one gives one line that names file and key."""

from __future__ import annotations

import json

import pytest

from plait.disk.store import read_manifest
from plait.errors import InputError
from plait.evaluation.splits import HALVES
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import report_again, run
from plait.runs.unit_records import completed_rows, merge_kept, unit_result
from plait.runs.units import ALONE, FEATURES, FOLDS, MERGE, STATISTICS, TUNING, Unit
from tests.conftest import resealed, tiny_raw
from tests.test_pipeline import SCALED

TASKS = ("x", "y")
SCORES = {"x": 91.5, "y": -3}
HALF = {"scale": 0.5, "selected": 40.0, "score": SCORES, "regret_half": None, "regret_double": 2.5, "edge": False}
GRID = [{"scale": 0.5, "part": "A", "tasks": SCORES}, {"scale": 1, "part": "B", "tasks": SCORES}]
PART = {"alone": SCORES, "floor": SCORES}
PREDICTED = {"shift": 0.1, "cosine": 0.2, "norm": 1.0, "overlap": 0.5}

UNITS = {
    "alone": (
        Unit(ALONE, 0, "arm", split=FOLDS),
        {**{h: {**PART, "crossed": {"x": SCORES, "y": SCORES}} for h in HALVES}, "delta_norm": {"x": 1.0, "y": 0.0}},
    ),
    "alone tuning": (Unit(ALONE, 0, "arm", split=TUNING), {"tuning": PART, "delta_norm": {"x": 1.0, "y": 0.0}}),
    "merge": (
        Unit(MERGE, 0, "arm", merge="ties", split=FOLDS),
        {"grid": GRID, "halves": dict.fromkeys(HALVES, HALF), "discarded_energy": 0.25},
    ),
    "merge tuning": (
        Unit(MERGE, 0, "arm", merge="ties", split=TUNING),
        {"grid": [{"scale": 0.5, "part": "tuning", "tasks": SCORES}], "scale": 0.5, "score": 44.25},
    ),
    "features": (
        Unit(FEATURES, 0, "arm", split=FOLDS),
        {"tasks": dict.fromkeys(TASKS, PREDICTED), "shifts": {"x": {"x": 0.0, "y": None}, "y": {"x": 1.5, "y": 0.0}}},
    ),
    "statistics": (Unit(STATISTICS, 0), {"x": {"tokens": 12}}),
}
GONE = object()
EDITS = [
    ("alone", ("A", "alone", "x"), "91.5", "result.A.alone.x is '91.5', expected a finite number of at least -100"),
    ("alone", ("B", "floor", "y"), GONE, "result.B.floor.y is absent"),
    ("alone", ("B", "floor", "y"), True, "result.B.floor.y is True"),
    ("alone", ("A",), [1], "result.A is [1], expected an object"),
    ("alone", ("A", "crossed", "x", "y"), 101, "crossed[x].y is 101"),
    ("alone", ("delta_norm", "x"), -1.0, "result.delta_norm.x is -1.0"),
    ("alone tuning", ("delta_norm", "y"), GONE, "result.delta_norm.y is absent"),
    ("merge", ("halves", "A", "scale"), 0, "result.halves.A.scale is 0, expected a finite number above 0"),
    ("merge", ("halves", "B", "edge"), "false", "result.halves.B.edge is 'false', expected true or false"),
    ("merge", ("halves", "B", "regret_double"), float("inf"), "result.halves.B.regret_double is inf"),
    ("merge", ("halves", "B", "score", "x"), None, "result.halves.B.score.x is None"),
    ("merge", ("halves", "B"), GONE, "result.halves.B is absent, expected an object"),
    ("merge", ("grid",), [], "result.grid is [], expected a list of objects"),
    ("merge", ("grid",), GONE, "result.grid is None, expected a list of objects"),
    ("merge", ("grid", 1, "part"), "C", "result.grid[1].part is 'C', expected one of A, B"),
    ("merge", ("grid", 0, "tasks", "y"), 1e9, "result.grid[0].tasks.y is 1000000000.0"),
    ("merge", ("discarded_energy",), 1.5, "result.discarded_energy is 1.5"),
    ("merge tuning", ("score",), GONE, "result.score is absent"),
    ("merge tuning", ("scale",), 10**400, "result.scale is"),
    ("features", ("tasks", "y", "norm"), "1", "result.tasks.y.norm is '1'"),
    ("features", ("shifts", "x", "x"), -0.5, "shifts[x].x is -0.5"),
]


@pytest.mark.parametrize("name", UNITS)
def test_what_was_written_is_what_is_read(name):
    unit, result = UNITS[name]
    assert unit_result({"result": result}, unit, TASKS, "plait.json") == result


def test_a_training_that_diverged_has_nothing_else():
    unit, _ = UNITS["alone tuning"]
    assert unit_result({"result": {"diverged": "x: NaN"}}, unit, TASKS, "f") == {"diverged": "x: NaN"}
    with pytest.raises(InputError, match=r"result\.diverged is 3, expected a text"):
        unit_result({"result": {"diverged": 3}}, unit, TASKS, "f")
    with pytest.raises(InputError, match="result is absent, expected an object"):
        unit_result({}, unit, TASKS, "f")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    EDITS,
    ids=[f"{i}: {e[0]} {'.'.join(map(str, e[1]))}" for i, e in enumerate(EDITS)],
)
def test_an_edited_unit_is_refused_by_file_and_key(name, place, value, message):
    unit, result = UNITS[name]
    edited = json.loads(json.dumps({"result": result}))
    *way, last = place
    inner = edited["result"]
    for key in way:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(InputError) as raised:
        unit_result(edited, unit, TASKS, "here/plait.json")
    assert message in str(raised.value) and "here/plait.json" in str(raised.value)
    assert "\n" not in raised.value.what and "delete the unit's folder" in raised.value.hint


def test_the_record_of_a_merge_that_was_kept():
    record = {
        "method": "ties",
        "options": {},
        "weights": [1.0, 2.0],
        "tasks": ["x"],
        "backbone_prefix": "",
        "adapters": [{"name": "x"}],
    }
    assert merge_kept({"result": record}, "f") == record
    for key, value, message in (
        ("method", 3, "result.method is 3"),
        ("options", [], "result.options is []"),
        ("weights", [1.0, "2"], "result.weights is [1.0, '2'], expected a list of finite numbers"),
        ("tasks", ["x", 1], "result.tasks is ['x', 1]"),
        ("backbone_prefix", None, "result.backbone_prefix is None"),
        ("adapters", [1], "result.adapters[0] is 1"),
        ("adapters", [{"name": 1}], "result.adapters[0].name is 1"),
    ):
        with pytest.raises(InputError) as raised:
            merge_kept({"result": {**record, key: value}}, "f")
        assert message in str(raised.value)


def test_rows_that_were_completed():
    assert completed_rows({"result": {"completed": {"q": 2}}}, "f") == {"q": 2} and completed_rows({}, "f") == {}
    with pytest.raises(InputError, match=r"f: result\.completed\.q is '2', expected an integer"):
        completed_rows({"result": {"completed": {"q": "2"}}}, "f")


def test_an_edited_run_says_which_unit(tiny_base, tmp_path):
    recipe = parse_recipe(tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic"]) | SCALED, "tiny")
    out = tmp_path / "out"
    run(recipe, out, quiet=True)
    folder = out / "scores" / "kaiming" / "seed-0" / "alone"
    result = dict(read_manifest(folder)["result"])
    result["A"] = {**result["A"], "alone": {"topic": "much"}}
    resealed(folder, result=result)
    with pytest.raises(InputError) as raised:
        report_again(out)
    assert "result.A.alone.topic is 'much'" in str(raised.value)
    assert str(folder / "plait.json") in str(raised.value) and raised.value.exit_code == 3
