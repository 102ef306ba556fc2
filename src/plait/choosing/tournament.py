"""A tournament of merges: every one at the scales around its best on a few texts; the fewer are left, the more they read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from plait.border.counts import plural
from plait.choosing.asking import Asking
from plait.choosing.candidates import Tried
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import Panel
from plait.fidelity.record import Evidence, FidelityRecord
from plait.fidelity.texts import first_of
from plait.learning.checkpoints import NOTHING_KEPT, Checkpoints
from plait.progress import OnProgress

# Texts of each adapter that a round reads, and the part of merges x scales that goes on from it: half as many read twice the texts
# (successive halving: Karnin et al., ICML 2013). On the same texts merges differ by much less than texts do, so few tell them apart.
ROUNDS = ((16, 4), (32, 8), (64, 16))
# Where answers are not kept a round reads its texts from the first one on, so there is one before the last.
ROUNDS_READ_AGAIN = ((32, 8),)
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
    checkpoints: Checkpoints = NOTHING_KEPT,
) -> list[Scored]:
    """Score all merges on a few texts, fewer and fewer of them on more, the best on all; best first, later rounds before earlier ones.

    A merge begins at the scale nearest to where its factors alone would have it (`Tried.near`) and at both scales beside that.
    While its best lies on the edge of those it was tried at, it is tried a step further, along `scales` and then beyond
    them, so that its best lies within: where a merge has one hill over the scales, that is the best of all of them.
    Merges that move general text further than `max_shift` come last, the least first. Scores that are kept are taken from there.

    Cost: four to five scales a merge on the texts of the first round; then what `number_going` says of merges x scales, on those that a
    round adds, or on all of a round's where answers are not kept.
    """

    def place(one: Scored) -> tuple[bool, float]:
        over = not one.within(max_shift)
        return over, (one.fidelity.general_kl or 0.0) if over else -one.fidelity.score

    rounds = rounds_of(panel)
    screen = read_in(panel, rounds[0][0], max_shift)
    entries = [(t, s) for t in tried for s in beginning(t, scales)]
    scored: list[Scored] = []
    asking = Asking.of(tried, checkpoints, on_progress)

    def asked(panel: Panel, entries: Sequence[tuple[Tried, float]], n: int, said: str) -> list[Scored]:
        scores = asking.scores(panel, entries, n, said)
        return [Scored(t, s, f, n) for (t, s), f in zip(entries, scores, strict=True)]

    while entries:
        scored += asked(screen, entries, rounds[0][0], f"{plural(len(entries), 'merge')}, by fidelity")
        entries = list(_beyond(scored, place, scales)) if len(scales) > 1 else []
    scored.sort(key=place)
    for (_, share), (texts, _) in pairwise(rounds):
        going = scored[: number_going(len(tried), len(scales), share)]
        said = f"the best {len(going)} of them, on {'all texts' if texts == rounds[-1][0] else plural(texts, 'text')}"
        again = asked(read_in(panel, texts, max_shift), [(s.tried, s.scale) for s in going], texts, said)
        scored = sorted(again, key=place) + scored[len(going) :]
    panel.known.forget_others(p.adapter for p in panel.parts)
    checkpoints.watch_merges(())
    return scored


def rounds_of(panel: Panel) -> list[tuple[int, int]]:
    """List the rounds: texts of each adapter that it reads, at most, and the part of merges x scales that goes on; the last reads all."""
    longest = max(len(rows) for rows in panel.texts.values())
    before = ROUNDS_READ_AGAIN if panel.is_text else ROUNDS
    return [*(r for r in before if r[0] < longest), (longest, 0)]


def read_in(panel: Panel, texts: int, max_shift: float | None = None) -> Panel:
    """Give what a round reads: so many texts of each adapter; the general ones too where it is the last, or they decide."""
    last = texts >= rounds_of(panel)[-1][0]
    return panel.with_texts(first_of(panel.texts, texts), general=last or max_shift is not None)


def number_going(merges: int, scales: int, share: int) -> int:
    """Count the merges at scales that go on from a round: one of `share`, and two at least."""
    return max(2, merges * scales // share)


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
