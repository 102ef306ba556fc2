"""What runs note of themselves in their folder."""

from __future__ import annotations

import pytest

from plait.errors import RunError
from plait.runs.journal import JOURNAL, about_runs, command, noted


def test_runs_are_noted_also_where_they_fail(tmp_path):
    assert about_runs(tmp_path) == {}
    with noted(tmp_path, "cpu", "Processes", 1, 3):
        pass
    with pytest.raises(RunError), noted(tmp_path, "cpu", "Processes", 1, 3):
        raise RunError("lost")
    said = about_runs(tmp_path)
    assert said["seconds"] == "0 in 2 runs" and said["executor"] == "Processes (1 training, 3 scoring)"
    with noted(tmp_path, "cpu", "RayCluster", 2, 2):
        pass
    assert "a Ray cluster" in about_runs(tmp_path)["hardware"]


def test_a_run_that_was_killed_is_told(tmp_path):
    with noted(tmp_path, "cpu", "Processes", 1, 3):
        begun = (tmp_path / JOURNAL).read_bytes()
    assert b"begun" in begun and "more" not in about_runs(tmp_path)["seconds"]
    (tmp_path / JOURNAL).write_bytes(begun + (tmp_path / JOURNAL).read_bytes())
    assert about_runs(tmp_path)["seconds"] == "0 in 1 run, 1 more did not come to an end"
    (tmp_path / JOURNAL).write_bytes(begun)
    assert about_runs(tmp_path) == {}


def test_a_run_notes_when_and_by_which_command_without_folders_of_this_machine(tmp_path, monkeypatch):
    typed = ["/home/me/bin/plait", "run", "/home/me/my.yaml", "--out", "/home/me/out", "--set=base.model=~/base"]
    monkeypatch.setattr("sys.argv", typed)
    with noted(tmp_path, "cpu", "InProcess", 1, 1):
        pass
    about = about_runs(tmp_path)
    assert about["command"] == "plait run ./my.yaml --out ./out --set=base.model=./base"
    assert len(about["date"]) == 10 and about["date"].startswith("20")
    assert command(["/usr/bin/pytest", "-x"]) == command([]) == ""
