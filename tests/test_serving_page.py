"""The page of the servers: what counts as right, and the figures that stand in docs/results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_page", ROOT / "benchmarks" / "serving" / "page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(server: str = "vllm", difference: float | None = 1e-5, verdict: str = "ok", **more: Any) -> dict[str, Any]:
    measure = "max_logprob_diff" if server == "vllm" else "max_prob_diff"
    found = {
        "server": server,
        "version": "1",
        "folder": "f",
        measure: difference,
        "first_token_equal": 12,
        "prompts": 12,
    }
    check = {"exit": 0 if verdict == "ok" else 3, "verdict": verdict, "why": "alpha_pattern is not read"}
    return {**found, "moved": 1.0, "refused": None, "check": check} | more


@pytest.mark.parametrize(
    ("found", "right", "agrees"),
    [
        (row(), True, True),
        (row(difference=2e-4), False, False),
        (row(first_token_equal=11), False, False),
        (row("llama.cpp", 5e-3), True, True),
        (row("llama.cpp", 2e-2), False, False),
        (row("llama.cpp", 2e-2, "loads something else"), False, True),
        (row(verdict="loads something else"), True, False),
        (row(difference=None, verdict="refuses it", refused="DoRA"), False, True),
        (row(difference=None, refused="DoRA"), False, False),
        (row(verdict="refuses it"), True, False),
    ],
)
def test_what_counts_as_right_and_as_foretold(page, found, right, agrees):
    assert page.right(found) == right and page.agrees(found) == agrees
    assert ("not what happened" in page.table([found], found["server"])) == (not agrees)


def test_an_adapter_that_moves_little_proves_nothing(page):
    assert page.clear(row()) and page.clear(row(moved=None))
    assert not page.clear(row(moved=9e-4)) and not page.clear(row("llama.cpp", moved=0.09))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((RESULTS / "serving.json").read_text())


def test_the_page_is_made_of_the_rows(page, report):
    assert (RESULTS / "serving.md").read_text() == page.page(report)


@pytest.mark.parametrize(("server", "right"), [("vllm", 12), ("llama.cpp", 11)])
def test_the_figures_are_within_their_limits(page, report, server, right):
    rows = [r for r in report["rows"] if r["server"] == server]
    if not rows:
        pytest.skip(f"no run of {server} in docs/results")
    assert all(page.clear(r) for r in rows) and all(page.agrees(r) for r in rows)
    assert sum(page.right(r) for r in rows) >= right and sum(bool(r["refused"]) for r in rows) == 2
    assert rows[0]["folder"] == "base" and page.right(rows[0])
