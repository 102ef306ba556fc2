"""The page of the merging benchmark: made of its rows, and of nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("merging_page", HERE / "merging_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(tool: str, method: str, seconds: float, **more: Any) -> dict[str, Any]:
    kept = {"shape": "s", "tool": tool, "method": method, "seconds": seconds, "over_floor": seconds / 0.5}
    return {**kept, "process_seconds": 2 * seconds, "peak_mb": 40.0, "runs": 3} | more


ROWS = [
    row("safetensors", "floor", 0.5),
    row("plait", "linear", 1.0, seconds_verified=1.5, over_floor_verified=3.0),
    row("plait", "cat", 2.5, disk_mb=25.0, over_floor_exact=1.8),
    row("plait", "ties", 9.0, over_row_block_sum=4.0, peak_mb=210.0),
    row("peft", "ties_svd", 90.0),
    row("peft", "linear", 3.0),
    row("mergekit", "ties", 180.0, stopped=True),
    {"shape": "s", "tool": "mergekit", "method": "linear", "error": "no tensor"},
]


def test_verdicts_follow_the_numbers(page):
    text = page.targets(ROWS)
    assert "linear 2.0x, cat 5.0x | **missed** by cat" in text and "ties 4.0x | met" in text
    assert "ties 210 MB | **missed** by ties" in text


def test_a_stopped_run_is_a_lower_bound_and_a_failed_one_is_named(page):
    assert "| mergekit | ties | over 180.000 | over 360.0x" in page.times(ROWS)
    assert "failed: no tensor" in page.times(ROWS)
    assert "| plait | linear | 1.000 | 2.0x | 3.0x |" in page.times(
        ROWS
    ) and "| peft | linear | 6.0x | linear | 2.0x |" in page.peers(ROWS)
    assert "| plait | cat | 2.500 | 5.0x |  | 1.8x | 5.0 s |" in page.times(ROWS)
    assert len({line.count("|") for line in page.times(ROWS).splitlines() if "failed" not in line}) == 1
    assert "| ties_svd | 180.0x | ties | 10.0x |" in page.peers(ROWS) and "over 20.0x" in page.peers(ROWS)


def test_published(page, tmp_path):
    machine = {"versions": {"torch": "2"}, "cores": 2, "threads": 2, "python": "3"}
    page.publish(tmp_path, {"rows": ROWS, "machine": machine, "command": "python x"})
    text = (tmp_path / "merging.md").read_text()
    assert "{{" not in text and page.times(ROWS) in text and "500 ms (s)" in text
    assert json.loads((tmp_path / "merging.json").read_text())["rows"] == ROWS
