"""Folders with names: where results of a recipe lie whose units differ in what people type."""

from __future__ import annotations

from pathlib import Path

from plait.recipes.recipe import Recipe
from plait.runs.units import MERGE, REPAIR, REPAIRED, STATISTICS, TRAIN, Unit


def named(recipe: Recipe, unit: Unit) -> Path:
    """Say where the result of a unit lies under names, which tell apart all units of a recipe that is not tuned.

    Args:
        recipe: The recipe; its statistics are those that need no name of their own.
        unit: The unit.

    Returns:
        The folder within the recipe's.
    """
    root = Path("variants", unit.variant) if unit.variant else Path()
    if unit.stage == STATISTICS:
        spec = recipe.statistics
        own = "" if (unit.pool, unit.samples) == (spec.pool, spec.samples) else f"-{unit.pool}-{unit.samples}"
        return root / "statistics" / f"seed-{unit.seed}{own}"
    place = Path(unit.arm, f"seed-{unit.seed}")
    folders = {
        TRAIN: root / "adapters" / place,
        MERGE: root / "merged" / place / unit.merge,
        REPAIR: root / "repair" / place / unit.merge,
        REPAIRED: root / "scores" / place / f"{unit.merge}-repaired",
    }
    return folders.get(unit.stage, root / "scores" / place / unit.stage)
