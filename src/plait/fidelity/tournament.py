"""A tournament of merges: every one at the scales around its best, on a part of the texts; the best of them on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from plait.fidelity.candidates import Tried
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import Panel
from plait.fidelity.record import Evidence, FidelityRecord
from plait.fidelity.score import fidelities
from plait.progress import OnProgress

# Texts of each adapter in the first round, in which everything is tried; and the share of all merges and scales that goes on.
SCREEN, GOES_ON = 32, 8
# Beyond the scales that are given: by this factor, so often at most.
STEP, GROWTH = 2**0.5, 6


@dataclass(frozen=True, slots=True)
class Scored:
    """A merge at one scale and its fidelity.

    Args:
        tried: The merge at scale 1.
        scale: Scale of its delta.
        fidelity: On the texts of the round it reached.
        n: Texts of each adapter in that round, at most.
    """

    tried: Tried
    scale: float
    fidelity: Fidelity
    n: int

    def within(self, max_shift: float | None) -> bool:
        """Whether it moves general text by a limit at most, where there is one."""
        return max_shift is None or (self.fidelity.general_kl or 0.0) <= max_shift

    @property
    def evidence(self) -> Evidence:
        """Its line in the evidence."""
        recipe, fidelity = self.tried.recipe, FidelityRecord.of(self.fidelity)
        return Evidence(
            recipe.label,
            recipe.method,
            recipe.calibrate,
            self.scale,
            recipe.moments,
            self.n,
            fidelity.score,
            fidelity.general_kl,
            tasks=fidelity.tasks,
        )


def tournament(
    panel: Panel,
    tried: Sequence[Tried],
    scales: Sequence[float],
    on_progress: OnProgress = lambda _: None,
    max_shift: float | None = None,
) -> list[Scored]:
    """Score all merges on a part of the texts, the best of them on all; best first, later rounds before earlier ones.

    A merge begins at the scale nearest to where its factors alone would have it (`Tried.near`) and at both scales beside that.
    While its best lies on the edge of those it was tried at, it is tried a step further, along `scales` and then beyond
    them, so that its best lies within: where a merge has one hill over the scales, that is the best of all of them.
    Merges that move general text further than `max_shift` come last, the least first.

    Cost: four to five scales a merge, on at most 32 texts of each adapter; as many as an eighth of merges x scales on the others.
    """

    def place(one: Scored) -> tuple[bool, float]:
        over = not one.within(max_shift)
        return over, (one.fidelity.general_kl or 0.0) if over else -one.fidelity.score

    longest, screen = longest_of(panel), screen_of(panel, max_shift)
    entries = [(t, s) for t in tried for s in beginning(t, scales)]
    first: list[Scored] = []
    while entries:
        on_progress(f"{len(entries)} merges, by fidelity")
        first += _scored(screen, entries, min(SCREEN, longest), on_progress)
        entries = list(_beyond(first, place, scales)) if len(scales) > 1 else []
    first.sort(key=place)
    if longest <= SCREEN:
        panel.known.forget_others(p.adapter for p in panel.parts)
        return first
    going = first[: number_going(len(tried), len(scales))]
    on_progress(f"the best {len(going)} of them, on all texts")
    last = _scored(panel, [(s.tried, s.scale) for s in going], longest, on_progress)
    panel.known.forget_others(p.adapter for p in panel.parts)
    return sorted(last, key=place) + first[len(going) :]


def longest_of(panel: Panel) -> int:
    """Count the texts of the adapter that has most."""
    return max(len(rows) for rows in panel.texts.values())


def screen_of(panel: Panel, max_shift: float | None = None) -> Panel:
    """Give the texts of the first round; the general ones too where there is no second, or they decide."""
    few = {t: rows[:SCREEN] for t, rows in panel.texts.items()}
    return panel.with_texts(few, general=longest_of(panel) <= SCREEN or max_shift is not None)


def number_going(merges: int, scales: int) -> int:
    """Count the merges at scales that go on to all texts."""
    return max(2, merges * scales // GOES_ON)


def beginning(tried: Tried, scales: Sequence[float]) -> list[float]:
    """Choose the scales a merge is tried at first: three neighbours, the middle one nearest to where it is expected.

    Args:
        tried: The merge.
        scales: All scales, above 0.
    """
    grid = sorted(set(scales))
    if len(grid) <= 3:
        return grid
    nearest = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / max(tried.near, 1e-12))))
    first = min(max(nearest - 1, 0), len(grid) - 3)
    return grid[first : first + 3]


def _beyond(
    scored: Sequence[Scored], place: Callable[[Scored], tuple[bool, float]], scales: Sequence[float]
) -> Iterator[tuple[Tried, float]]:
    """For every merge whose best scale is the smallest or largest it was tried at: the merge, and the scale a step further."""
    by_merge: dict[int, list[Scored]] = {}
    for one in scored:
        by_merge.setdefault(id(one.tried), []).append(one)
    for ones in by_merge.values():
        at = min(ones, key=place).scale
        tried = [r.scale for r in ones]
        if at == max(tried):
            further = min((s for s in scales if s > at), default=at * STEP)
        elif at == min(tried):
            further = max((s for s in scales if s < at), default=at / STEP)
        else:
            continue
        if min(scales) / STEP**GROWTH < further * 1.001 and further < max(scales) * STEP**GROWTH * 1.001:
            yield ones[0].tried, further


def _scored(panel: Panel, entries: Sequence[tuple[Tried, float]], n: int, on_progress: OnProgress) -> list[Scored]:
    scores = fidelities(panel, [(t.adapter, s) for t, s in entries], on_progress, keep=True)
    return [Scored(t, s, f, n) for (t, s), f in zip(entries, scores, strict=True)]
