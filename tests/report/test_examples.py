"""The examples in the docstrings of the report."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["table", "inference", "numbers", "words"])
def test_examples_give_what_they_show(name):
    failed, tried = doctest.testmod(import_module(f"plait.report.{name}"))
    assert tried > 0 and not failed
