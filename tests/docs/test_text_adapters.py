"""The script of the README's adapters: what it writes is what the README's commands name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from plait.adapters.peft_format import read_adapter

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "tutorial" / "make_text_adapters.py"


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory) -> Path:
    """A folder in which the script was run, on a tiny Llama."""
    folder = tmp_path_factory.mktemp("readme")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-P", str(SCRIPT), str(tiny_base("llama").name)]
    done = subprocess.run(command, check=False, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_files_that_the_readme_names_have_the_columns_that_it_names(made):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = [m.split(":") for m in re.findall(r"\b\w+\.csv:[\w:]+", text)]
    assert {file for file, *_ in named} == {"reviews.csv", "requests.csv", "prompts.csv"}
    for file, *columns in named:
        assert set(columns) <= set(pandas.read_csv(made / file).columns), file


def test_prompts_are_those_that_the_readme_shows(made):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for i, prompt in enumerate(pandas.read_csv(made / "prompts.csv").prompt, 1):
        assert f"{i}. " + prompt.replace("\n", "\n   ") + "\n" in text


def test_its_adapters_are_trained(made):
    for name in ("sentiment", "topics"):
        adapter = read_adapter(made / "adapters" / name)
        assert all(float(f.B.abs().max()) > 0 for f in adapter.modules.values())
    reviews = pandas.read_csv(made / "reviews.csv")
    assert reviews.sentiment.value_counts().to_dict() == {"negative": 40, "positive": 40} and reviews.review.is_unique
