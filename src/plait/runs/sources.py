"""What units read of earlier ones: statistics, trained adapters, and merges of these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.border.checked import Record
from plait.disk.manifest import MANIFEST
from plait.disk.store import read_manifest
from plait.errors import Diverged
from plait.merging import Merged
from plait.runs.layout import Layout
from plait.runs.units import DIVERGED, REPAIR, REPAIRED, Unit
from plait.statistics import Statistics, open_statistics

BACKGROUND = "background."  # prefix of the files of tasks that only lend their statistics


def statistics_of(unit: Unit, layout: Layout) -> tuple[dict[str, Statistics], list[Statistics]]:
    """Statistics by task, and those of the background, that a unit reads."""
    source = layout.statistics_unit(unit)

    def read() -> tuple[dict[str, Statistics], list[Statistics]]:
        folder = layout.path(source)
        found = {t: open_statistics(folder / f"{t}.stats.safetensors") for t in layout.tasks}
        pool = sorted(folder.glob(f"{BACKGROUND}*.stats.safetensors"))
        return found, [open_statistics(p) for p in pool]

    return layout.cached(layout.path(source), read)


def adapters_of(unit: Unit, layout: Layout) -> dict[str, Adapter]:
    """Task -> the trained adapter a unit is about, at the moment it is about."""
    repaired = unit.stage == REPAIRED
    root = layout.path(replace(unit, stage=REPAIR, split="") if repaired else layout.trained_by(unit))
    tail = Path("steps") / f"{unit.step:06d}" if unit.step and not repaired else Path()

    def read() -> dict[str, Adapter]:
        for why in (diverged(root / t) for t in layout.tasks):
            if why:  # noted by the sweep of another study in this folder
                raise Diverged(f"the training diverged: {why}", where=unit.label, hint="lower its rate")
        return {t: read_adapter(root / t / tail, name=t) for t in layout.tasks}

    return layout.cached(root / tail, read)


def merged_of(unit: Unit, layout: Layout) -> Merged:
    """The merge a unit is about, at scale 1, computed; its record holds what the cut to the summed rank took."""
    from plait.merging import merge
    from plait.merging.registry import find_method

    spec = layout.recipe.merge(unit.merge)
    adapters = list(adapters_of(unit, layout).values())
    statistics = statistics_of(unit, layout)[0] if find_method(spec.merge_method).needs else None
    verify = not layout.recipe.tuned
    return merge(adapters, spec.spec(unit.seed), statistics=statistics, verify=verify, name=spec.name)


def diverged(folder: Path) -> str:
    """What happened to an adapter of the sweep of which a folder holds that alone; "" where it holds an adapter."""
    manifest = read_manifest(folder)
    if manifest is None:
        return ""
    return Record.of(manifest, str(folder / MANIFEST)).record("result", optional=True).text(DIVERGED, "")
