"""The examples in docstrings are run: what they print is what a reader of the docstring is promised."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
OF_A_FOLDER = {"plait.loading.__init__"}  # reads an adapter that a reader has and a test has not
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in (SOURCE / "plait").rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
    and ".".join(file.relative_to(SOURCE).with_suffix("").parts) not in OF_A_FOLDER
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_are_right(module):
    done = doctest.testmod(importlib.import_module(module))
    assert done.attempted and not done.failed


def test_the_rooms_that_people_build_on_have_examples():
    assert {"plait.merging.planning", "plait.merging.spec", "plait.adapters.lora", "plait.formats.names"} <= set(
        WITH_EXAMPLES
    )
