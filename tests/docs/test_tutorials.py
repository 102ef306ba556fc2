"""The tutorials, run as they stand: every command, and what is printed under it but for the digits."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from plait.cli import main

DOCS = Path(__file__).parents[2] / "docs"
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUTPUTS = {"tutorial-merge.md": 3, "tutorial-train.md": 2}  # commands under which something is shown
pytestmark = [pytest.mark.slow, pytest.mark.ci_sample, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]


def steps_of(blocks: list[str]) -> list[tuple[str, list[str]]]:
    """Each command of a page's console blocks, with the lines shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line:
            found[-1][1].append(line)
    return found


def shape(line: str) -> str:
    """A line without its figures, and without the blanks and dashes that follow their widths; a row of scores by its names."""
    if "±" in line:
        return " ".join(line.split()[:2])  # which task is worst hangs on a row or two
    return re.sub(r"[\s-]+", " ", re.sub(r"[+-]?\d[\d.,]*(e-\d+)?", "#", line)).strip()


def run(command: str) -> None:
    program, *rest = shlex.split(command)
    if program == "python":
        runpy.run_path(rest[0], run_name="__main__")
        return
    assert program == "plait"
    with pytest.raises(SystemExit) as ended:
        main(rest)
    assert not ended.value.code, command


@pytest.mark.parametrize("page", OUTPUTS)
def test_the_page_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    for file in (DOCS / "tutorial").iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setenv("COLUMNS", "200")
    shown = 0
    for command, lines in steps_of(CONSOLE.findall((DOCS / page).read_text("utf-8"))):
        capsys.readouterr()
        run(command)
        printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
        for line in lines:
            assert shape(line) in printed, f"{command}: {line!r} is not among {printed}"
        shown += bool(lines)
    assert shown == OUTPUTS[page]
    assert os.getcwd() == str(tmp_path)


def test_the_merge_of_the_tutorial_keeps_what_the_page_says():
    """The figures of the page are those of its own table."""
    text = (DOCS / "tutorial-merge.md").read_text("utf-8")
    alone, merged, floor = (
        float(re.search(p, text)[1]) for p in (r"has (\d+\.\d), the", r"merge (\d+\.\d), the", r"floor is (\d+\.\d)")
    )
    share = round(100 * (merged - floor) / (alone - floor))
    assert f"and {share} % of the other's" in " ".join(text.split())


def test_rows_are_made_where_the_other_tutorial_was(tmp_path, monkeypatch):
    """Its base stands there already."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        runpy.run_path(str(DOCS / "tutorial" / "make_rows.py"), run_name="__main__")
    assert (tmp_path / "clinc.train.csv").is_file() and (tmp_path / "base" / "config.json").is_file()
