"""A study packed into one file: the tables come out of it again, nothing private goes in."""

import json
import shutil
import tarfile

import pytest

from plait.cli import main
from plait.errors import RunError, UsageError
from plait.report import write_report
from plait.runs.archive import write_archive
from plait.runs.layout import Layout
from plait.runs.run import run
from plait.runs.units import MERGE
from plait.runs.waves import all_units
from tests.conftest import tiny_rows


def said_by(capsys, *command):
    with pytest.raises(SystemExit) as ended:
        main(["study", *map(str, command)])
    return ended.value.code, capsys.readouterr().err


def test_the_archive_gives_the_tables_again(small_study, tmp_path, capsys):
    base = shutil.copytree(small_study().base.model, tmp_path / "base")
    variant = {
        "name": "one-task",
        "set": {"tasks": small_study().model_dump(mode="json")["tasks"][:1]},
        "arms": ["kaiming"],
    }
    study = small_study(seeds=[0], base={"model": str(base), "device": "cpu"}, variants=[variant])
    layout = Layout(study, tmp_path / "out")
    with pytest.raises(RunError, match="not finished"):
        write_archive(layout, tmp_path / "early.tar.xz")
    assert not (tmp_path / "early.tar.xz").exists()
    assert run(study, layout.out, layout=layout, quiet=True).finished
    published = json.loads(write_report(layout, tmp_path, name="tiny").json.read_text("utf-8"))
    assert any(r["variant"] == "one-task" for r in published["rows"])
    first = tmp_path / "first.tar.xz"
    capsys.readouterr()
    command = ("archive", tmp_path / "out", "--to", first, "--base", "./a-base", "--data", "./rows")
    assert said_by(capsys, *command) == (0, "")
    code, told = said_by(capsys, *command)
    assert code == 2 and "first.tar.xz" in told  # there already
    write_archive(layout, tmp_path / "second.tar.xz", base="./a-base", data="./rows")
    assert first.read_bytes() == (tmp_path / "second.tar.xz").read_bytes()

    for gone in (base, tmp_path / "data", tmp_path / "out"):
        shutil.rmtree(gone)
    with tarfile.open(first) as packed:
        packed.extractall(tmp_path / "elsewhere", filter="data")
    folder = tmp_path / "elsewhere" / study.name
    assert {p.name for p in folder.iterdir()} == {
        "alone", "merge", "features", "repaired", "recipe.json", "inputs.json", "runs.jsonl"
    }  # fmt: skip
    raw = json.loads((folder / "recipe.json").read_text())
    assert (raw["base"]["model"], raw["data"]["root"]) == ("./a-base", "./rows")
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(tmp_path).encode() not in content and tiny_rows(2, 24)[0]["text"].encode() not in content, path
    assert said_by(capsys, "table", folder, "--to", tmp_path / "again") == (0, "")
    again = json.loads((tmp_path / "again" / f"{study.name}.json").read_text())
    for key in ("rows", "best", "references", "sweep", "comparisons", "predictors"):
        assert again[key] == published[key], key


def test_an_archive_is_of_a_finished_study_and_called_so(small_study, tmp_path):
    study = small_study(seeds=[0], arms=["kaiming", "orthonormal"], repair=None, variants=[], rates=[0.03])
    layout = Layout(study, tmp_path / "out")
    assert run(study, layout.out, layout=layout, quiet=True).finished
    with pytest.raises(UsageError, match="is called"):
        write_archive(layout, tmp_path / "study.zip")
    shutil.rmtree(layout.path(next(u for u in all_units(layout) if u.stage == MERGE and u.merge)))
    with pytest.raises(RunError):
        write_archive(Layout(study, layout.out), tmp_path / "study.tar.xz")
