"""Whether a rule that knows how long the updates are would lose less: its numbers fitted on all bases but one, and tried on that one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from plait.merging.scales import RULES

LOG_SCALES = np.linspace(np.log(0.05), np.log(8.0), 160)
FACTORS, POWERS = np.linspace(-2.5, 2.5, 101), np.linspace(-1.0, 0.4, 15)
FEWEST = 20  # rows from which a method is tried


def by_length(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a method: points of recovered lost, mean over arms, by c T^p and by c T^p L^q, fitted on the other bases.

    p is the rule's; L is the length of an adapter's update, mean over tasks, in units of 10.

    Args:
        curves: As `scales.curves_of_archives` gives them; what has no length is left out.
    """
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for c in curves:
        if "length" in c:
            cells[c["method"], c["base"], c["tasks"], c["source"], c["arm"]].append(c)
    methods: dict[str, list[tuple[str, float, float, NDArray[Any]]]] = defaultdict(list)
    for (method, base, tasks, _, _), cell in cells.items():
        lost = _lost(cell)
        if not any(b == base and np.array_equal(lost, other) for b, _, _, other in methods[method]):  # archived twice
            methods[method].append((base, float(tasks), float(np.mean([c["length"] for c in cell])), lost))
    return [_row(m, rows) for m, rows in sorted(methods.items()) if len(rows) >= FEWEST and _rule(m) in RULES]


def _rule(method: str) -> tuple[str, str | None]:
    name, _, calibration = method.partition(" + ")
    return name, calibration or None


def _lost(cell: Sequence[Mapping[str, Any]]) -> Float[NDArray[Any], " scales"]:
    """Points lost over `LOG_SCALES`, against the scales that labels of the other half chose; mean over seeds and halves."""
    found = []
    for c in cell:
        x, y = np.log([s for s, _ in c["curve"]]), np.array([v for _, v in c["curve"]])
        found.append(100 * (np.interp(np.log(c["best"]), x, y) - np.interp(LOG_SCALES, x, y)))
    return np.mean(found, 0)


def _row(method: str, rows: Sequence[tuple[str, float, float, NDArray[Any]]]) -> dict[str, Any]:
    base = np.array([r[0] for r in rows])
    offset = RULES[_rule(method)][1] * np.log([r[1] for r in rows])
    length = np.log(np.array([r[2] for r in rows]) / 10)
    lost = np.stack([r[3] for r in rows])
    tried: dict[str, list[float]] = {"number": [], "length": []}
    for one in np.unique(base):
        own, others = base == one, base != one
        for kind, powers in (("number", np.zeros(1)), ("length", POWERS)):
            fits = [
                (float(_at(lost[others], offset[others] + c + q * length[others]).mean()), c, q)
                for c in FACTORS
                for q in powers
            ]
            _, c, q = min(fits)
            tried[kind] += list(_at(lost[own], offset[own] + c + q * length[own]))
    return {"method": method, "rows": len(rows), "bases": len(np.unique(base))} | {
        k: round(float(np.mean(v)), 2) for k, v in tried.items()
    }


def _at(
    lost: Float[NDArray[Any], "rows scales"], log_scale: Float[NDArray[Any], " rows"]
) -> Float[NDArray[Any], " rows"]:
    """Points lost by each row at a scale of its own, between those of the grid."""
    place = np.clip((log_scale - LOG_SCALES[0]) / (LOG_SCALES[1] - LOG_SCALES[0]), 0, len(LOG_SCALES) - 1.001)
    low = place.astype(int)
    row = np.arange(len(lost))
    found: NDArray[Any] = lost[row, low] + (place - low) * (lost[row, low + 1] - lost[row, low])
    return found
