"""A little fuzzing with every run of the tests; and proof that the fuzzer finds what it is there to find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plait.adapters import header
from plait.border.checked import Record
from plait.statistics import records
from tests.fuzz.driver import fuzz, place_of, reproduce, rows, run
from tests.fuzz.targets import TARGETS, attempt, write

BY_NAME = {t.what: t for t in TARGETS}


@pytest.mark.parametrize("what", BY_NAME)
def test_the_seeds_are_read(what, tmp_path):
    for files in BY_NAME[what].seeds():
        assert attempt(BY_NAME[what], write(files, tmp_path, BY_NAME[what].file)) == (True, None)


@pytest.mark.parametrize("what", BY_NAME)
def test_changed_files_end_in_errors_of_plaits_own_or_in_sound_values(what):
    found = run(BY_NAME[what], seed=77, count=150)
    assert found.fell == 0, found.examples
    assert 0 < found.accepted < found.tried == 150  # neither all refused nor nothing really changed


@pytest.mark.slow
@pytest.mark.parametrize("what", BY_NAME)
def test_many_changed_files(what):
    found = run(BY_NAME[what], seed=78, count=5000)
    assert found.fell == 0, found.examples


def lax_flag(self: Record, key: str, default: bool = False) -> bool:
    return bool(self.values.get(key, default))  # "false" is true


def lax_site(entry: Record) -> records.SiteRecord:
    raw = entry.values
    return records.SiteRecord(
        int(raw["count"]), int(raw["padded_count"]), raw["dim"], str(raw["form"]), float(raw["error"]), 0.0, None
    )


PLANTED = {
    "texts are true": ("adapter folders", Record, "flag", lax_flag, "Broken"),
    "a header that nobody checks": ("Fisher files", header, "_wrong_in", lambda name, entry: "", "Error"),
    "counts as they come": ("statistics files", records, "site_record", lax_site, "Error"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug, monkeypatch, tmp_path):
    what, owner, name, planted, kind = PLANTED[bug]
    monkeypatch.setattr(owner, name, planted)
    for seed in range(20):
        found = run(BY_NAME[what], seed, 300)
        hits = [k for k in found.kinds if kind in k]
        if hits:
            break
    else:
        pytest.fail("6,000 inputs did not find it")
    words = found.examples[hits[0]].split()
    path = reproduce(BY_NAME[what], int(words[1]), int(words[3].rstrip(":")), tmp_path)
    error = attempt(BY_NAME[what], path)[1]
    assert error is not None and place_of(error) == hits[0]  # and it can be looked at again
    monkeypatch.undo()
    assert attempt(BY_NAME[what], path)[1] is None


def test_rows_add_up_and_the_same_seed_makes_the_same_inputs(tmp_path):
    once, again = (fuzz(60, seed=5, only="mergekit", log=tmp_path / "rows.json") for _ in range(2))
    assert once == again
    for row in rows(once):
        assert row["tried"] == row["held"] + row["fell"] == 60
    assert json.loads((tmp_path / "rows.json").read_text()) == rows(once)


@pytest.mark.slow
def test_the_command_line_and_two_processes(tmp_path):
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-P",
        "-m",
        "tests.fuzz",
        "--count",
        "400",
        "--processes",
        "2",
        "--to",
        str(tmp_path / "rows.json"),
    ]
    env = {"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert sum(r["tried"] for r in json.loads(done.stdout)) == 400
