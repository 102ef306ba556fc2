"""What benchmarks take from plait is there: their runs are rare, and a name that has moved would be met on a machine lent by the minute."""

from __future__ import annotations

import ast
import importlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(f.relative_to(BENCHMARKS).as_posix() for f in BENCHMARKS.rglob("*.py"))


def names_from_plait(source: str) -> list[tuple[str, str]]:
    """(module, name) of everything that is imported from plait, in functions too."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and not n.level]
    return [(n.module, a.name) for n in nodes if n.module and n.module.split(".")[0] == "plait" for a in n.names]


def is_there(module: str, name: str) -> bool:
    """Whether a module has a name, or a module below it."""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("file", FILES)
def test_names_are_there(file):
    missing = [m for m in names_from_plait((BENCHMARKS / file).read_text()) if not is_there(*m)]
    assert not missing


def test_a_name_that_has_moved_is_noticed():
    source = "def f():\n    from plait.merging.folders import rounded_merge\n"
    assert [m for m in names_from_plait(source) if not is_there(*m)] == [("plait.merging.folders", "rounded_merge")]


def test_the_readme_names_every_script_and_every_published_page():
    readme = (BENCHMARKS / "README.md").read_text()
    scripts = [f for pattern in ("*.py", "*.sh", "*.mjs") for f in BENCHMARKS.glob(pattern)]
    packages = [f.parent for f in BENCHMARKS.glob("*/__main__.py")]
    named = set(re.findall(r"`([a-z_0-9]+(?:\.[a-z]+)?)`", readme))
    assert {f.name for f in (*scripts, *packages)} - named == set()
    table = [re.split(r"[, ]+", row.replace("\\*", "*")) for row in re.findall(r"^\| (.*?) \|", readme, re.M)]
    patterns = [name for row in table for name in row]
    families = [f"existing{name}" for name in patterns if name.startswith("-")]
    pages = [f.stem for f in (BENCHMARKS.parent / "docs" / "results").glob("*.md")]
    assert [p for p in pages if not any(fnmatch(p, name) for name in (*patterns, *families))] == []
    scripts_named = {name for name in named if re.search(r"\.(py|sh|mjs)$", name)}
    assert scripts_named - {f.name for f in scripts} == set()
