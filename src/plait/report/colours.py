"""One colour for each arm, the same on every page and in every figure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from plait.recipes.sections import PLAIN_ARMS

__all__ = ["DARK", "LIGHT", "PALETTE", "REST", "ranked_arms", "slots_of"]
# Okabe & Ito's palette: told apart with any colour vision.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b0a000")
# The same for the page's own charts, where every colour stands out from the paper (3:1) and from the others with any colour vision.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a48044", "#0036b7", "#000000", "#2b3700")
DARK = ("#5aaeff", "#ff8a4c", "#2dd4a0", "#f0a0cf", "#bd9573", "#0a889e", "#f2f2f2", "#fcd902")
REST = "#c8c8c8"  # arms without a colour of their own
# The arms that shipped recipes and published studies have most: their places in the palette.
_OWN = {
    "contrastive": 0,
    "kaiming": 1,
    "contrastive_penalised": 2,
    "osrm": 3,
    "kaiming_penalised": 4,
    "gaussian": 5,
    "orthonormal_shared": 6,
    "osrm_mean": 7,
}


def ranked_arms(main: str, best_first: Sequence[str]) -> list[str]:
    """Order the arms of a page for what can show only some: the main one, the plain ones, then the best ones.

    Args:
        main: The arm the others are compared with.
        best_first: All arms, by what they recover.
    """
    return list(dict.fromkeys([main, *(a for a in best_first if a in PLAIN_ARMS), *best_first]))


def slots_of(ranked: Sequence[str]) -> dict[str, int]:
    """Give arms their places in the palette; those beyond its length have none.

    Well-known arms have places of their own. Any other arm goes by its name, and to the next place where that one is taken.

    Args:
        ranked: Arms, the most important first.

    >>> slots_of(["mine", "contrastive"])["contrastive"], len(slots_of([str(i) for i in range(9)]))
    (0, 8)
    """
    shown = ranked[: len(PALETTE)]
    slots = {arm: _OWN[arm] for arm in shown if arm in _OWN}
    for arm in shown:
        if arm not in slots:
            first = zlib.crc32(arm.encode())
            slots[arm] = next(s for i in range(len(PALETTE)) if (s := (first + i) % len(PALETTE)) not in slots.values())
    return {arm: slots[arm] for arm in shown}
