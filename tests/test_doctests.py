"""The examples in the docstrings hold."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "plait"
NEED_FILES = {"plait.loading"}  # of the reader's own
WITH_EXAMPLES = sorted(
    "plait." + ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", [n for n in WITH_EXAMPLES if n not in NEED_FILES])
def test_examples_hold(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
