"""The scale of a merge that is changed: one that was given stays, one that was chosen follows the adapters that are in it then."""

from __future__ import annotations

from collections.abc import Mapping

from plait.border.multipliers import checked_multiplier
from plait.errors import UsageError
from plait.merging.changes import Change, Recorded
from plait.merging.scales import OF_STATISTICS, SUMS, WEIGHTS_SAY, Scale, scale_by_rule


def scale_anew(recipe: Recorded, change: Change, weights: Mapping[str, float]) -> Scale | None:
    """Say at which scale a changed merge is made.

    A new weight says how much of an adapter there is beside the others. It leaves the scale alone, which follows from the method and
    from how many adapters count; else the others would grow where one is turned down.

    Args:
        recipe: The merge as it was recorded.
        change: What becomes of it.
        weights: Name -> weight in the changed merge.

    Returns:
        The scale, and why; None where merging anew chooses it.

    Raises:
        UsageError: Statistics chose it, other adapters are in the merge now, and there are no statistics.
    """
    record, method = recipe.record, str(recipe.options["method"])
    before = float(recipe.options.get("scale", 1.0))
    if change.scale is not None:
        return Scale(checked_multiplier(change.scale, "scale"), "")
    if record.scale_reason in (None, "", WEIGHTS_SAY):
        return Scale(before, record.scale_reason or "")
    weighted = method in SUMS and any(w != 1.0 for w in weights.values())
    if record.scale_reason.endswith(OF_STATISTICS) and (weighted or not change.statistics):
        if change.add or change.remove:
            raise UsageError(
                "statistics chose its scale, and now there are other adapters",
                where=str(recipe.path),
                hint="--scale NUMBER" if weighted else "--stats TASK=FILE of every one, or --scale NUMBER",
            )
        return Scale(before, record.scale_reason)
    if weighted:
        counted = [float(w != 0.0) for w in weights.values()]
        return scale_by_rule(method, recipe.options.get("calibrate"), counted)
    return None
