"""Every bad input ends in its exit code and one line with file, key and next step; what was there stays, nothing is left."""

from __future__ import annotations

import resource
import shutil
import time
import warnings
from pathlib import Path

import pytest

from plait.cli import main
from tests.robustness.cases import ADAPTERS, FILES, FOUND, NAMES
from tests.robustness.newer import NEWER
from tests.robustness.system import ELSEWHERE, SYSTEM
from tests.robustness.world import Case, build, state

CASES = [*FILES, *ADAPTERS, *NAMES, *FOUND, *NEWER, *SYSTEM]
SECONDS, GIGABYTE = 10.0, 1 << 20  # ru_maxrss is in kB


def row(case: Case) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=case.waits)] if case.waits else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


@pytest.mark.parametrize("case", [row(c) for c in CASES])
def test_a_bad_input(case, whole, tmp_path, monkeypatch, capsys):
    world = tmp_path / "w"
    shutil.copytree(whole, world)
    monkeypatch.chdir(world)
    case.change(world)
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with case.around(world):
        before = state(world)
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            main(list(case.args))
        after = {k: v for k, v in state(world).items() if not any(k == n or k.startswith(f"{n}/") for n in case.new)}
    seconds, taken = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    said = capsys.readouterr()
    assert (ended.value.code or 0) == case.code, said.err
    assert after == before
    assert "Traceback" not in said.err and "unexpected" not in said.err
    if case.code:
        assert said.err.count("\n") == 1 and said.err.startswith(("error: ", "interrupted")), said.err
        assert not [w for w in case.words if w not in said.err], said.err
        assert said.err.rstrip("\n").isprintable() and not said.out
    assert seconds < SECONDS and taken < GIGABYTE


def test_every_number_of_the_list_is_in_the_table():
    numbers = {int(c.name.split()[0]) for c in CASES if c.name.split()[0].isdigit()} | set(ELSEWHERE)
    assert numbers == set(range(1, 59))
    root = Path(__file__).parents[2]
    for file, word in ELSEWHERE.values():
        assert word in (root / file).read_text(encoding="utf-8"), f"{file} says nothing of {word}"


def test_names_of_rows_are_distinct():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)


def test_the_world_is_sound(whole, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(whole)
    for args in (
        ["inspect", "A"], ["inspect", "M"], ["inspect", "kohya.safetensors"], ["stats", "check", "a.stats.safetensors"],
        ["stats", "show", "a.stats.safetensors"],
        ["merge", "mergekit.yaml", "--out", str(tmp_path / "a")], ["merge", "M", "A", "--out", str(tmp_path / "b")],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert not ended.value.code, capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:  # whose base and rows are nowhere, which is all that is wrong with it
        main(["validate", "recipe.yaml"])
    assert ended.value.code == 3 and "its keys and values are valid" in capsys.readouterr().err
