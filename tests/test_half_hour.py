"""The queue of the half hour on GPUs: arguments are understood, the plan fits, and (slow) all of it runs, small, to its pages."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from plait.cli import app
from plait.recipes.recipe_file import read_recipe
from tests import half_hour

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "half_hour.sh"
PLACES = {
    **{n: f"/nowhere/{n.lower()}" for n in ("MODEL", "SMALLER", "SMOL", "TASKS", "GLUE", "MPNET", "TOKENIZER")},
    "GENERAL": "/nowhere/g.parquet:text",
}


def bash(*arguments: str, **environment: str) -> str:
    env = {**os.environ, "PY": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def planned(gpus: int) -> list[tuple[str, int, str, int]]:
    lines = re.findall(r"(\w+) +from minute +(\d+): (\S+), (\d+) min", bash("plan", GPUS=str(gpus)))
    return [(lane, int(begin), names, int(minutes)) for lane, begin, names, minutes in lines]


def test_what_matters_most_ends_in_time_and_one_gpu_does_the_same_steps():
    ends = {n: begin + minutes for _, begin, names, minutes in planned(2) for n in names.split("+")}
    for step in ("masks_8b", "q15_auto", "full_penalised", "q15_price", "q15_refreshed", "eleven_20"):
        assert ends[step] * 60 <= 1400, step
    assert {n for _, _, names, _ in planned(1) for n in names.split("+")} == set(ends)


# Steps that no lane names at present, and one may name again.
RESTING = ("fleet_8b", "q05_1", "full_smollm2")


class Understood(Exception):
    """Arguments that a parser has taken."""


def calls(tmp_path: Path, dry: str) -> list[list[str]]:
    """What the steps call, with a Python that writes down its arguments."""
    log, fake = tmp_path / "calls", tmp_path / "python"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\x1f" "$@" >> {log}\nprintf "\\n\\x1e" >> {log}\n')
    fake.chmod(0o755)
    environment = {**PLACES, "DRY": dry, "PY": str(fake), "WORK": str(tmp_path / "work")}
    for step in dict.fromkeys([n for _, _, names, _ in planned(2) for n in names.split("+")] + [*RESTING]):
        bash("work", step, **environment)
    return [c.rstrip("\n").split("\x1f")[:-1] for c in log.read_text().split("\x1e") if c]


@pytest.mark.parametrize("dry", ["", "1"])
def test_every_step_is_called_with_arguments_that_it_knows(dry, tmp_path, monkeypatch):
    for folder in ("benchmarks", "benchmarks/speed"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    real = argparse.ArgumentParser.parse_args

    def parse(self, arguments=None, namespace=None):
        raise Understood(real(self, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    scripts = set()
    for call in calls(tmp_path, dry):
        assert call[0] == "-P"
        if call[1:3] == ["-m", "plait"]:
            command, words = get_command(app), call[3:]
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context("plait", words)
        elif call[1:3] == ["-m", "pytest"]:
            assert (ROOT / call[-1]).is_file()
        else:
            script = Path(call[1])
            assert (ROOT / script).is_file()
            scripts.add(script.name)
            monkeypatch.setattr(sys, "argv", call[1:])
            with pytest.raises(Understood):
                importlib.import_module(script.stem).main()
        settings = [v for k, v in itertools.pairwise(call) if k == "--set"]
        if recipe := next((c for c in call if c.endswith(".yaml")), None):
            read_recipe(ROOT / recipe, settings)  # names and values are what a recipe has
    assert scripts == {
        "text_arms.py",
        "text_auto.py",
        "more_texts.py",
        "training_8b.py",
        "full_finetuning.py",
        "text_rounds.py",
        "gpu.py",
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_queue_runs_small_to_its_pages(tmp_path):
    places = half_hour.make(tmp_path / "in")
    work = {**places, "WORK": str(tmp_path / "work"), "DRY": "1", "GPUS": "1", "UNTIL": "3000"}
    bash("start", **work)
    bash("collect", "1500", OUT=str(tmp_path / "out"), **work)
    steps = (tmp_path / "work" / "steps").read_text()
    names = {n for _, _, several, _ in planned(1) for n in several.split("+")}
    assert {n for n in names if f" {n}: ended with 0" in steps} == names, steps
    before = (tmp_path / "work" / "steps").read_text().count("ended")
    bash("start", **work)  # what is done is not done again
    while "no lane runs" not in bash("status", **work):
        time.sleep(0.5)
    assert (tmp_path / "work" / "steps").read_text().count("ended") == before
    assert len(list((tmp_path / "out").iterdir())) <= 8
    (tmp_path / "pages").mkdir()
    bash("pages", FROM=str(tmp_path / "out"), TO=str(tmp_path / "pages"), **work)
    made = {f.name for f in (tmp_path / "pages").iterdir()}
    assert {"text-qwen15.md", "full-finetuning.md", "existing-texts-eleven-more.md"} <= made
    arms = {r["arm"] for r in json.loads((tmp_path / "pages" / "full-finetuning.json").read_text())["rows"]}
    assert arms == {"kaiming", "contrastive_penalised"}
