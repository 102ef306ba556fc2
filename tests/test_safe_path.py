"""Nothing runs from the working directory: files there that are called like modules are data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plait.runs.executors import SAFE_PATH
from tests.study.conftest import raw_study

PLANTED = [
    "plait", "torch", "json", "yaml", "numpy", "typer", "transformers", "peft", "safetensors", "datasets", "re", "os",
    "logging", "random", "typing", "click", "rich", "jinja2", "pyarrow", "sitecustomize", "usercustomize",
]  # fmt: skip


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder with modules that leave a mark when they are imported."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in PLANTED:
        mark = folder / f"{name}.canary"
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nraise ImportError('planted')\n")
    return folder


def sung(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.canary"))


def plait(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "plait", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # what the child does by itself
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_canaries_sing(evil):
    ended = subprocess.run(
        [sys.executable, "-m", "plait", "ls"], cwd=evil, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode and sung(evil)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("ls", "tasks", "--json"),
        ("validate", "nothing.yaml"),
        ("inspect", "."),
        ("merge", ".", "--out", "x"),
    ],
)
def test_commands_import_nothing_from_the_working_directory(evil, arguments):
    plait(evil, *arguments)
    assert sung(evil) == []


def test_the_child_that_matches_patterns_imports_nothing_from_there(evil, monkeypatch):
    from plait.statistics.targets import require_quick_regex

    monkeypatch.chdir(evil)
    require_quick_regex(".*query", ["a.query", "b.key"], "target_modules")
    assert sung(evil) == []


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_processes_of_a_study_import_nothing_from_there(evil, tiny_base, tmp_path, executor):
    if executor == "ray":
        pytest.importorskip("ray", reason="needs the extra 'ray'")
    raw = raw_study(tiny_base("bert"), tmp_path / "data")
    raw |= {"arms": ["kaiming"], "rates": [0.03], "seeds": [0], "merges": ["task_arithmetic"], "variants": []}
    del raw["repair"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    out = tmp_path / "out"
    ended = plait(evil, "study", "run", tmp_path / "study.yaml", "--out", out, "--executor", executor, "--quiet")
    assert ended.returncode == 0, ended.stderr
    assert list(out.glob("alone/*/plait.json")) and sung(evil) == []


def test_every_child_is_told(monkeypatch):
    from plait.runs import executors as executor

    told = []
    monkeypatch.setattr(executor.subprocess, "Popen", lambda command, **how: told.append((command, how["env"])))
    executor._start(0)
    ((command, environment),) = told
    assert command[1] == "-P" and environment.items() >= SAFE_PATH.items()
