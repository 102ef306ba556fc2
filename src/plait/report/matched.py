"""Arms compared where they are alike: merged scores at the reference's delta norm, and at its score alone, from the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.report.table import mean

__all__ = ["MATCHED", "Matched", "matched_rows", "rising"]
Swept = Mapping[str, Any]  # a row of `plait.runs.waves.swept`
MATCHED = {"norm": "delta_norm", "alone": "alone"}  # what is held equal -> the key of a swept row that holds it


@dataclass(frozen=True, slots=True)
class Matched:
    """An arm against another under a merge, where something is equal.

    Args:
        arm, against, merge: Coordinates.
        matched: What is equal: "norm" or "alone".
        at: Norms or scores that were compared, ascending.
        of: Number of points the arm has on its rising branch.
        arm_merged, reference_merged, difference: Means over `at`, points; None where no point of the arm lies inside the
            reference's range.
    """

    arm: str
    against: str
    merge: str
    matched: str
    at: tuple[float, ...]
    of: int
    arm_merged: float | None
    reference_merged: float | None
    difference: float | None


def matched_rows(sweep: Sequence[Swept], against: str) -> list[Matched]:
    """Compare every arm of a sweep with one arm, at equal delta norm and at equal score alone, under each tuning merge.

    The rates of the reference draw a curve, merged score over log norm (or over score alone), one a moment, piecewise
    linear; a point of another arm is held against the curve of its own moment, so that steps are equal too, and only
    where the curve has been: nothing is extrapolated. Both arms give the branch on which the score alone rises (`rising`).
    It describes tuning rows of one seed; it tests nothing.

    Args:
        sweep: Swept rows of all arms. Joint arms (nothing merged) and trainings that diverged are passed over.
        against: The reference.

    Returns:
        A row per arm, merge and what is equal.
    """
    known = [r for r in sweep if r["merged"]]
    arms = [a for a in dict.fromkeys(r["arm"] for r in known) if a != against]
    merges = list(dict.fromkeys(m for r in known for m in r["merged"]))
    mine = {a: [r for r in known if r["arm"] == a] for a in (against, *arms)}
    names = [(arm, what, merge) for arm in arms for what in MATCHED for merge in merges]
    return [
        Matched(arm, against, merge, what, *_compared(mine[arm], mine[against], MATCHED[what], merge))
        for arm, what, merge in names
    ]


def rising(rows: Sequence[Swept], key: str) -> list[Swept]:
    """Order rows by rate, without those that reach no more than a lower rate did: what is left has one row to a value.

    A score alone rises with the rate and falls behind its best. Behind it the same score is there a second time, and norms
    that only adapters worse at their own task have: what they merge to says nothing of a score or a norm worth having.
    """
    kept: list[Swept] = []
    for row in sorted(rows, key=lambda r: float(r["lr"])):
        if not kept or row[key] > kept[-1][key]:
            kept.append(row)
    return kept


def _compared(
    mine: Sequence[Swept], reference: Sequence[Swept], key: str, merge: str
) -> tuple[tuple[float, ...], int, float | None, float | None, float | None]:
    """Find the arm's points that have an equal in the reference: `Matched` from `at` on."""
    place = math.log if key == "delta_norm" else float
    pairs, of = [], 0
    for step in dict.fromkeys(r["step"] for r in mine):
        learning = (rising([r for r in rows if r["step"] == step], "alone") for rows in (reference, mine))
        curve, points = (rising(rows, key) for rows in learning)
        of += len(points)
        for p in (p for p in points if curve and curve[0][key] <= p[key] <= curve[-1][key]):
            there = np.interp(place(p[key]), [place(r[key]) for r in curve], [r["merged"][merge] for r in curve])
            pairs.append((p[key], p["merged"][merge], float(there)))
    at, ours, theirs = (tuple(pair[i] for pair in sorted(pairs)) for i in range(3))
    arm, other = (mean(v) if v else None for v in (ours, theirs))
    difference = None if arm is None or other is None else arm - other
    return at, of, arm, other, difference
