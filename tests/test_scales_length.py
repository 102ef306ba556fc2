"""benchmarks/scales_length.py: that it finds a rule of the length where there is one, and loses by it where bases differ."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from scales_length import by_length


def curves(best):
    """Ten arms on three bases, two of the same numbers of tasks; each score falls by the squared log distance from its best scale."""
    ladder = np.geomspace(0.1, 4.0, 30)
    for place, base in enumerate("abc"):
        for arm in range(10):
            length = 5.0 * 2.0 ** (arm / 3)
            top = best(place, length)
            curve = [(float(s), float(1 - np.log(s / top) ** 2)) for s in ladder]
            yield {
                "method": "task_arithmetic", "base": base, "tasks": 4, "source": base, "arm": str(arm), "best": top, "length": length,
                "curve": curve,
            }  # fmt: skip


def test_a_length_that_decides_on_every_base_is_found():
    (row,) = by_length(list(curves(lambda place, length: 3.0 / length)))
    assert (row["rows"], row["bases"]) == (30, 3)
    assert (
        row["length"] == pytest.approx(0, abs=0.3) and row["number"] > 20
    )  # percent of variance over a ladder of lengths


def test_a_length_that_decides_otherwise_on_each_base_does_not_help():
    (row,) = by_length(list(curves(lambda place, length: (length / 10) ** (-0.7, 0.0, 0.4)[place])))
    assert row["length"] > row["number"]
