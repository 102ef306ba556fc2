"""What runs note of themselves in their folder."""

from __future__ import annotations

import pytest

from plait.errors import RunError
from plait.runs.journal import about_runs, noted


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
