"""The best merge of a finished run, as one adapter folder that is ready for use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.counts import plural
from plait.border.records import to_json
from plait.disk.manifest import MANIFEST
from plait.disk.store import identity, read_manifest, staged_folder
from plait.evaluation.splits import HALVES
from plait.runs.folder import PRODUCTS
from plait.runs.layout import Layout
from plait.runs.sources import merged_of
from plait.runs.unit_records import merge_kept
from plait.runs.units import ALONE, FOLDS, MERGE, TRAIN, Unit
from plait.runs.waves import final_units, result

BEST = PRODUCTS[0]
CARRIED = ("method", "options", "weights", "tasks", "backbone_prefix")  # of a merge's record: `plait edit` reads them


def best_place(layout: Layout) -> Path:
    """The folder that `write_best` writes."""
    return layout.out / BEST


def write_best(layout: Layout) -> Path | None:
    """Write the merge that scores best on the rows its scale is chosen from, scaled, with every task's head.

    Returns:
        Its folder; None where the adapters it is made of are gone, as in an archive, or no merge was scored.
    """
    scored = best_units(layout)
    if not scored:
        return None
    unit = max(scored, key=lambda u: np.mean([half["selected"] for half in result(layout, u)["halves"].values()]))
    made = {str(layout.path(u).relative_to(layout.out)): layout.key(u) for u in scored}
    wanted, out = identity(BEST, {"name": layout.recipe.name}, made, unit.seed), best_place(layout)
    if layout.is_whole(out, wanted, overwrite=True):
        return out
    if not layout.done(replace(layout.trained_by(unit), stage=TRAIN)):
        return None
    adapter, record = _merge(layout, unit)
    scale = shipped_scale(result(layout, unit)["grid"])
    modules = {m: LoraFactors(f.A, f.B * (f.scaling * scale), 1.0, f.kind) for m, f in adapter.modules.items()}
    kept: dict[str, Any] = {k: record[k] for k in CARRIED if k in record}
    kept |= {"arm": unit.arm, "merge": unit.merge, "seed": unit.seed, "scale": scale, **_scores(layout, unit)}
    kept["adapters"] = _inputs(layout, record)
    with staged_folder(out, wanted, overwrite=True, result=kept, unit=True) as folder:
        write_adapter(folder, replace(adapter, name=layout.recipe.name, modules=modules))
    return out


def best_units(layout: Layout) -> list[Unit]:
    """The merges among which the best is sought: all that are reported of the recipe itself."""
    units = [u for u in final_units(layout) if not u.variant and not layout.recipe.arm(u.arm).joint]
    merges = [replace(u, stage=MERGE, split=FOLDS, merge=m.name) for u in units for m in layout.recipe.merge_specs]
    return [u for u in merges if layout.done(u)]


def _merge(layout: Layout, unit: Unit) -> tuple[Adapter, Mapping[str, Any]]:
    """A scored merge at scale 1, and its record: read where it was kept."""
    path = layout.path(unit)
    if not layout.recipe.tuned:
        return read_adapter(path), merge_kept(dict(read_manifest(path) or {}), str(path / MANIFEST))
    merged = merged_of(unit, layout)
    return merged.adapter, to_json(merged.record)


def _inputs(layout: Layout, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the merge was made of, by places inside the run's folder: no path of this machine, and right wherever it is moved to."""
    told = []
    for one in record.get("adapters", ()):
        fields = {
            k: v for k, v in one.items() if k in ("name", "weight", "rank", "sha256", "kind", "task_type", "prefix")
        }
        path = Path(str(one.get("path", "")))
        whole, root = path.resolve(), layout.out.resolve()
        inside = whole.relative_to(root) if whole.is_relative_to(root) else None
        told.append(fields | ({"path": str(inside)} if inside else {}))
    return told


def _scores(layout: Layout, unit: Unit) -> dict[str, object]:
    """What the model card says of a merge: each task's score, its adapter's alone, and on which rows."""
    halves, alone = result(layout, unit)["halves"], result(layout, replace(unit, stage=ALONE, merge=""))
    rows = sum(len(layout.labels(task)) for task in layout.tasks)
    return {
        "scores": {t: float(np.mean([halves[h]["score"][t] for h in HALVES])) for t in layout.tasks},
        "scores_alone": {t: float(np.mean([alone[h]["alone"][t] for h in HALVES])) for t in layout.tasks},
        "metrics": {t: ", ".join(task.metrics) for t, task in layout.tasks.items()},
        "scored_on": f"In percent, on {plural(rows, 'validation row')} of {plural(len(layout.tasks), 'task')}; "
        "each half of them is scored at the scale "
        "that the other half chose.",
    }


def shipped_scale(grid: list[dict[str, Any]]) -> float:
    """The scale that is best on both halves together: the one to use where no half has to be kept apart.

    Args:
        grid: Of a scored merge: a list of {scale, part, tasks: {task: score}}.
    """
    scores: dict[float, dict[str, float]] = {}
    for row in grid:
        scores.setdefault(row["scale"], {})[row["part"]] = float(np.mean(list(row["tasks"].values())))
    whole = {s: parts for s, parts in scores.items() if set(parts) == set(HALVES)}
    return max(sorted(whole), key=lambda s: np.mean(list(whole[s].values())))
