"""The verdict of a comparison in plain words, and the record of numbers like those it stands on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from plait.advice.comparison import Comparison
from plait.advice.track_record import RECORDS, TABLES, told
from plait.merging.kinship import KIN

LONG = 3.0  # times the shortest: of two, the longer then holds 90 % of the squared length of their sum


def judged(comparison: Comparison, measure: str) -> Comparison:
    """Add the verdict, what it is worth, and the command that measures.

    Args:
        comparison: The numbers.
        measure: The command that measures what a merge keeps.
    """
    verdict = (*_directions(comparison), *_lengths(comparison), *_disturbed(comparison))
    return replace(comparison, verdict=verdict, record=tuple(_record(comparison)), next=measure)


def _directions(comparison: Comparison) -> Iterator[str]:
    known = [(p, p.cosine) for p in comparison.pairs if p.cosine is not None]
    for pair, cosine in known:
        if cosine > KIN:
            yield (
                f"{pair.a} and {pair.b} point the same way (cosine {cosine:.2f}): one was probably trained on from the other, "
                "and then the later one alone does both."
            )
        if cosine < -KIN:
            yield f"{pair.a} and {pair.b} point opposite ways (cosine {cosine:.2f}): their sum undoes much of either."
    for name in (a.name for a in comparison.adapters if a.norm == 0):
        yield f"{name} changes nothing: its update is zero (not trained yet?)."
    if known and all(abs(cosine) <= KIN for _, cosine in known):
        largest = max((cosine for _, cosine in known), key=abs)
        related = "hardly related" if abs(largest) < 0.1 else "not alike"
        yield f"By direction they are {related} (cosine of largest size {largest:+.3f}): nothing here speaks against merging."


def _lengths(comparison: Comparison) -> Iterator[str]:
    there = sorted((a for a in comparison.adapters if a.norm > 0), key=lambda a: a.norm)
    if len(there) > 1 and (ratio := there[-1].norm / there[0].norm) >= LONG:
        yield (
            f"{there[-1].name} is {ratio:.1f} times as long as {there[0].name}: of all squared lengths it holds "
            f"{100 * there[-1].share:.0f} %, and a plain sum does mostly what it says (--weights)."
        )


def _disturbed(comparison: Comparison) -> Iterator[str]:
    """Name the task whose outputs the others are predicted to move most."""
    moved: dict[str, float] = {}
    names = {a.name for a in comparison.adapters}
    for task in {t for by_task in comparison.shifts.values() for t in by_task} & names:
        others = [by_task[task] for adapter, by_task in comparison.shifts.items() if adapter != task]
        if all(map(math.isfinite, others)):
            moved[task] = sum(others)
    if moved:
        worst = max(sorted(moved), key=lambda t: moved[t])
        own = comparison.shifts[worst][worst]
        yield (
            f"Most disturbed, as predicted: {worst}; the others together move its modules' outputs by {100 * moved[worst]:.2g} % "
            f"of the base's own energy, its own adapter by {100 * own:.2g} %."
        )


def _record(comparison: Comparison) -> Iterator[str]:
    shown = ("shift", "cosine", "overlap", "norm") if comparison.shifts else ("cosine", "overlap", "norm")
    best = max(RECORDS[name].explained for name in shown)
    yield (
        f"Track record in {TABLES} tables of docs/results, rank correlation with the points that a task lost under TSV-M: "
        + "; ".join(map(told, shown))
        + f". On arms not seen, the best of them explained {100 * best:.0f} % of the variance in its best table, and in others "
        "nothing. Signs were not measured against losses. So these numbers find kin, opposites and imbalance; they do not "
        "forecast what a merge keeps."
    )
