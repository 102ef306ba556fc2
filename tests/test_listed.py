"""What is told of methods without importing them is what their registers hold; `python -m tests.test_listed` writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.cli.catalogue import catalogue
from plait.disk.method_lists import FILE, list_text, read_list
from plait.fidelity import listed as fidelity
from plait.merging import listed as merging
from plait.merging.calibration import CALIBRATIONS
from plait.subspaces import listed as subspaces
from tests.merging.test_light import run, saved

ROOMS = {"merging": merging, "subspaces": subspaces, "fidelity": fidelity}


def file_of(room: str) -> Path:
    return Path(ROOMS[room].__file__).parent / FILE


@pytest.mark.parametrize("room", ROOMS)
def test_the_lists_are_those_of_the_registers(room):
    methods = ROOMS[room].registered()
    assert file_of(room).read_text() == list_text(methods), "a method has changed: make lists"
    assert dict(read_list(file_of(room).parent)) == dict(methods)
    assert tuple(CALIBRATIONS) == merging.CALIBRATIONS


@pytest.mark.parametrize("what", ["", "merges", "subspaces", "recipes", "studies", "tasks"])
def test_ls_says_the_same_without_torch(what):
    code, said, errors = run("ls", *([what] if what else []), "--json", but=("pydantic", "yaml"))
    assert code == 0 and not errors, errors
    assert json.loads(said) == {"schema": 1, **json.loads(json.dumps(catalogue(what)))}


def test_recipes_are_checked_without_torch(tmp_path):
    code, said, errors = run("validate", "glue8-minilm", but=("pydantic", "yaml"))
    assert (code, said) == (0, "glue8-minilm: a valid recipe\n"), errors
    code, _, errors = run(
        "validate", "glue8-minilm", "--set", "merges=[tiez]", "--set", "arms=[kaimin]", but=("pydantic", "yaml")
    )
    assert code == 2 and "did you mean 'ties'" in errors and "did you mean 'kaiming'" in errors
    wrong = "merges=[{name: t, method: ties, options: {density: 3}}]"
    code, _, errors = run("validate", "glue8-minilm", "--set", wrong, but=("pydantic", "yaml"))
    assert code == 2 and "density is 3, expected float in (0, 1]" in errors
    code, _, errors = run("validate", "glue8-minilm", "--set", "training.learning_rat=1", but=("pydantic", "yaml"))
    assert code == 2 and "unknown training key 'learning_rat'" in errors


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ls", "merges"], ["merge", "a", "b", "--metod", "ties"], ["inspct", "a"]]
)
def test_who_only_lists_or_mistypes_does_without_numpy_too(arguments):
    code, _, errors = run(*arguments, but=("pydantic", "yaml"), also=("numpy",))
    assert code == (2 if errors else 0) and "ImportError" not in errors


def test_a_mistyped_method_is_told_without_torch(tmp_path):
    pair = [saved(tmp_path / n, i) for i, n in enumerate("ab")]
    code, _, errors = run("merge", *pair, "--method", "tiez", "--out", tmp_path / "o", but=("pydantic", "yaml"))
    assert (code, errors) == (2, "error: unknown merging method 'tiez' (did you mean 'ties'?)\n")
    assert not (tmp_path / "o").exists()


if __name__ == "__main__":
    for place, room_module in ROOMS.items():
        file_of(place).write_text(list_text(room_module.registered()))
