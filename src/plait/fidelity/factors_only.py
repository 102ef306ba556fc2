"""Choosing a merge from factors alone: no texts, no base, no forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plait.adapters.lora import Adapter
from plait.errors import UsageError
from plait.fidelity.candidates import Tried, merged_by, recipes
from plait.fidelity.choose import scaled
from plait.fidelity.proxy import OWN_SHARE, best_scale, mean_error, terms
from plait.merging.registry import find_method


def choose_by_factors(
    adapters: Sequence[Adapter], methods: Sequence[str], scales: Sequence[float], base_id: str | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """The merge whose outputs are nearest to every adapter's own on inputs drawn from assumed moments.

    Every method that needs no statistics is tried, with and without pico, at the scale that is best for it in closed
    form, s* = sum_t c_t / sum_t q_t (`plait.fidelity.proxy`), and at those of the grid; the least mean error wins.

    Args:
        adapters: At least two.
        methods: Which are tried; those that need statistics are left out.
        scales: Of the grid.
        base_id: Base id of the result where the adapters name one base by different names.

    Returns:
        The merge, scale folded in, and what belongs into its record.

    Raises:
        UsageError: None of the methods runs without statistics.
    """
    usable = [m for m in methods if not find_method(m).needs]
    if not usable:
        raise UsageError(f"{', '.join(methods)} need statistics, and there are no texts", hint="--text TASK=FILE")
    rows: list[dict[str, Any]] = []
    merges: dict[str, Tried] = {}
    for recipe in recipes((), usable):
        tried = Tried(recipe, merged_by(recipe, adapters, {}, base=base_id))
        found = terms(tried.adapter, adapters)
        merges[recipe.label] = tried
        for scale in sorted({*scales, round(best_scale(found), 4)} - {0.0}):
            rows.append(
                {
                    "candidate": recipe.label,
                    "method": recipe.method,
                    "calibrate": recipe.calibrate,
                    "scale": scale,
                    "assumed_error": mean_error(found, scale),
                    "tasks": sorted(
                        ({"task": t, "assumed_error": x.error(scale)} for t, x in found.items()),
                        key=lambda r: (-r["assumed_error"], r["task"]),
                    ),
                }
            )
    rows.sort(key=lambda r: (r["assumed_error"], r["candidate"], r["scale"]))
    best = rows[0]
    adapter = scaled(merges[best["candidate"]].adapter, best["scale"])
    chosen = {k: best[k] for k in ("candidate", "method", "calibrate", "scale")}
    return adapter, {"chosen": chosen, "assumed": {"own_share": OWN_SHARE}, "evidence": rows}
