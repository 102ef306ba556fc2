"""What of a recipe is still to be done, and about how much that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.runs.layout import Layout
from plait.runs.units import MERGE, REPAIR, STATISTICS, TRAIN, Unit

BACKWARD_COST = 2.5  # a training row costs about this many forward passes more


def cost(unit: Unit, layout: Layout) -> float:
    """About how many forward passes of one row a unit takes; for the estimate of the time that is left."""
    here = layout.of(unit)
    session, recipe = here.session, here.recipe
    if unit.stage == STATISTICS:
        return 1.2 * unit.samples * (len(session.tasks) + len(recipe.background))
    if unit.stage in (TRAIN, REPAIR):
        settings = here.settings(unit)
        steps = sum(settings.total_steps(len(session.training(t, unit.seed))) for t in session.tasks)
        return steps * settings.batch_size * (1 + BACKWARD_COST)
    rows = sum(len(here.labels(t)) for t in here.tasks)
    return rows * (len(recipe.scales_of(recipe.merge(unit.merge))) + 1 if unit.stage == MERGE else 2)


def pending(layout: Layout, units: Sequence[Unit]) -> list[Unit]:
    """Units whose result is not there, each once."""
    seen: dict[Path, Unit] = {}
    for unit in units:
        seen.setdefault(layout.of(unit).path(unit), unit)
    return [u for u in seen.values() if not layout.of(u).done(u)]
