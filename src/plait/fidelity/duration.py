"""How long choosing a merge with texts will take: one pass over some texts is timed, the rest is counted in such passes."""

from __future__ import annotations

import time
from collections.abc import Callable

from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities

# In passes over the same texts, measured with MiniLM on one core: many merges together take less each than one alone; a step of learning
# weights goes back through the model; a fit front to back runs it once for every layer and solves.
_TOGETHER, _STEP, _FIT = 0.85, 2.9, 7.3
# Texts of each adapter in a step of learning.
_BATCH = 8
# Merges whose grid of scales grows, of all that are tried.
_GROWTH = 1.04


def expected_seconds(
    panel: Panel,
    screen: Panel,
    merges: int,
    going: int,
    *,
    refine: int = 0,
    fits: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time both passes that every round of scoring begins with, and say how long all of it will take.

    Args:
        panel: All texts.
        screen: The texts of the first round.
        merges: Merges at scales that are tried in the first round.
        going: How many of them go on to all texts.
        refine: Steps in which weights, or factors, are learnt.
        fits: Fits front to back, one on half of the texts counting half.
        clock: Seconds of the machine.

    Cost: two passes over the texts of the first round.
    """
    started = clock()
    fidelities(screen, [])
    texts, all_texts = (sum(map(len, p.texts.values())) for p in (screen, panel))
    each = (clock() - started) / (2 * texts)
    first = _TOGETHER * (_GROWTH * merges + 2) * texts
    second = _TOGETHER * (going + 2) * all_texts if all_texts > texts else 0.0
    learning = refine * _BATCH * len(panel.parts) * _STEP
    return float(each * (first + second + learning + fits * _FIT * all_texts))


def in_words(seconds: float) -> str:
    """A length of time as a person says it.

    >>> in_words(41.2), in_words(200.0), in_words(9000.0)
    ('40 seconds', '3 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
