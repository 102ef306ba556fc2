"""Job files: what a scheduler does with them, from files and through standard input, and what is no job file."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plait.runs.units import Unit
from tests.command import call, one_object
from tests.study.conftest import raw_study

JOB = [sys.executable, "-P", "-m", "plait", "job", "run", "--quiet"]


@pytest.fixture
def study_file(tiny_base, tmp_path):
    """A study of two arms and one seed as a YAML file."""
    raw = raw_study(tiny_base("bert"), tmp_path / "data")
    raw |= {"arms": ["kaiming", {"name": "contrastive", "options": {"rho": 0.1}}], "rates": [0.03], "seeds": [0]}
    raw |= {"merges": ["task_arithmetic"], "variants": [], "repair": None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))
    return path


def listed(capsys, study_file, tmp_path) -> dict:
    code, said, _ = call(
        capsys,
        "job",
        "list",
        study_file,
        "--out",
        tmp_path / "out",
        "--to",
        tmp_path / "jobs",
        "--workers",
        2,
        "--json",
    )
    assert code == 0
    return one_object(said)


def test_jobs_are_done_from_files_and_from_standard_input(capsys, monkeypatch, study_file, tmp_path):
    first = listed(capsys, study_file, tmp_path)
    code, said, _ = call(capsys, "job", "run", first["jobs"][0], "--quiet", "--json")
    assert code == 0 and one_object(said)["done"] == len(json.loads(Path(first["jobs"][0]).read_text())["units"]) > 0
    code, said, _ = call(capsys, "job", "run", first["jobs"][0], "--quiet", "--json")
    assert code == 0 and one_object(said)["done"] == 0  # all of it is there
    second = listed(capsys, study_file, tmp_path)
    assert second["wave"] != first["wave"] or second["jobs"] != first["jobs"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(second["jobs"][0]).read_text()))
    code, said, _ = call(capsys, "job", "run", "-", "--quiet", "--json")
    assert code == 0 and one_object(said)["done"] > 0


@pytest.mark.slow
def test_a_scheduler_finishes_a_study(capsys, study_file, tmp_path):
    waves = []
    while (found := listed(capsys, study_file, tmp_path))["jobs"]:
        assert found["wave"] not in waves, "a wave that was done is listed again"
        waves.append(found["wave"])
        running = []
        for i, job in enumerate(found["jobs"]):  # an array: all jobs of a wave at once, every other one fed by a pipe
            command, text = ([*JOB, "-"], Path(job).read_text()) if i % 2 else ([*JOB, job], None)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
            )
            running.append((process, text))
        for process, text in running:
            _, err = process.communicate(text, timeout=240)
            assert process.returncode == 0, err
    assert len(waves) >= 3
    code, said, _ = call(capsys, "study", "table", tmp_path / "out", "--json")
    assert code == 0 and one_object(said)


WRONG = {
    "units is None, expected a list": lambda b: b.pop("units"),
    "units is 5": lambda b: b.update(units=5),
    r"units\[0\] is 'x', expected an object": lambda b: b.update(units=["x"]),
    r"units\[0\].stage is 'bake', expected one of": lambda b: b["units"][0].update(stage="bake"),
    r"units\[0\].seed is '0', expected an integer": lambda b: b["units"][0].update(seed="0"),
    r"units\[0\].rate is -1, expected": lambda b: b["units"][0].update(rate=-1),
    r"units\[0\].step is 1.5, expected an integer": lambda b: b["units"][0].update(step=1.5),
    r"unknown key 'units\[0\].more'": lambda b: b["units"][0].update(more=1),
    "schema is 2, expected 1": lambda b: b.update(schema=2),
    "schema is absent": lambda b: b.pop("schema"),
    "out is 3, expected a text": lambda b: b.update(out=3),
    "study is None, expected an object": lambda b: b.update(study=None),
    "until is 'soon', expected": lambda b: b.update(until="soon"),
    "unknown key 'more'": lambda b: b.update(more=1),
}


@pytest.mark.parametrize("way", ["file", "-"])
@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_job_file_is_named(capsys, monkeypatch, tmp_path, message, way):
    batch = {"schema": 1, "study": {}, "out": "x", "units": [Unit("statistics", 0).to_json()], "until": None}
    WRONG[message](batch)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(batch))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(batch)))
    code, said, err = call(capsys, "job", "run", path if way == "file" else "-", "--json")
    error = one_object(said)["error"]
    assert code == 3 and error["where"] == (str(path) if way == "file" else "standard input") and error["hint"]
    assert re.search(message, error["what"]) and err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_no_json_object_is_named(capsys, monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, said, _ = call(capsys, "job", "run", "-", "--json")
    assert code == 3 and one_object(said)["error"]["where"] == "standard input"
