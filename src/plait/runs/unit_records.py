"""What units leave in their manifests, read back: every number of its type and in its range, or one line that names file and key."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from plait.border.checked import LARGEST_NUMBER, Json, Record
from plait.evaluation.features import FEATURES as PREDICTORS
from plait.evaluation.splits import HALVES
from plait.runs.units import ALONE, DIVERGED, FEATURES, MERGE, REPAIRED, TUNING, Unit

_HINT = "delete the unit's folder: the next run does it again"
# Every metric lies between them, in percent; their mean by a rounding more.
_LEAST, _MOST = -100.0 - 1e-6, 100.0 + 1e-6
_LARGEST_SCALE = 1e6  # of a merge; grids that grow stop long before


def unit_result(manifest: Json, unit: Unit, tasks: Collection[str], where: str) -> Json:
    """Read what a unit has left, as it stands in its manifest.

    Args:
        manifest: As `read_manifest` has it.
        unit: Whose it is; its stage and split say what has to be there.
        tasks: Tasks of its recipe: each has a score.
        where: The manifest's file, for messages.

    Returns:
        The result itself; keys that nobody reads back may be in it.

    Raises:
        InputError: A key that is absent, of another type or out of range.

    Cost: linear in its numbers.
    """
    record = Record.of(manifest, where, hint=_HINT).record("result")
    if record.has(DIVERGED):
        record.text(DIVERGED)
    elif unit.stage in (ALONE, REPAIRED):
        _alone(record, unit, tasks)
    elif unit.stage == MERGE:
        _merge(record, unit, tasks)
    elif unit.stage == FEATURES:
        _features(record, tasks)
    return dict(record.values)


def merge_kept(manifest: Json, where: str) -> Json:
    """Read the record of a merge whose adapter was kept: what is carried into the run's best.

    Raises:
        InputError: As `unit_result`.
    """
    record = Record.of(manifest, where, hint=_HINT).record("result")
    record.text("method")
    record.text("backbone_prefix", "")
    record.texts("tasks")
    record.record("options")
    weights = record.values.get("weights")
    if not isinstance(weights, list) or not all(_is_finite(w) for w in weights):
        raise record.wrong("weights", weights, "a list of finite numbers")
    for adapter in _rows(record, "adapters"):
        adapter.text("name")
        adapter.text("path", "")
    return dict(record.values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def completed_rows(manifest: Json, where: str) -> dict[str, int]:
    """Read how many rows of A had to be completed, by module, of a trained adapter; {} where none had to.

    Raises:
        InputError: As `unit_result`.
    """
    rows = Record.of(manifest, where, hint=_HINT).record("result", optional=True).record("completed", optional=True)
    return {module: rows.integer(module, 1) for module in rows.values}


def _alone(record: Record, unit: Unit, tasks: Collection[str]) -> None:
    for part in _parts(unit):
        scored = record.record(part)
        for kind in ("alone", "floor"):
            _scores(scored.record(kind), tasks)
        for _, row in scored.record("crossed", optional=True).records():
            _scores(row, tasks)
    norms = record.record("delta_norm", optional=unit.split != TUNING)
    for task in norms.values if unit.split != TUNING else tasks:
        norms.number(task, 0.0)


def _merge(record: Record, unit: Unit, tasks: Collection[str]) -> None:
    for row in _rows(record, "grid"):
        _scale(row)
        row.text("part", choices=_parts(unit))
        _scores(row.record("tasks"), tasks)
    if record.has("discarded_energy"):
        record.number("discarded_energy", 0.0, 1.0)
    if unit.split == TUNING:
        _scale(record)
        record.number("score", _LEAST, _MOST)
        return
    halves = record.record("halves")
    for name in HALVES:
        half = halves.record(name)
        _scale(half)
        half.number("selected", _LEAST, _MOST)
        _scores(half.record("score"), tasks)
        half.flag("edge")
        for regret in ("regret_half", "regret_double"):
            if half.has(regret):  # null where the grid ends before
                half.number(regret, 2 * _LEAST, 2 * _MOST)


def _features(record: Record, tasks: Collection[str]) -> None:
    known = record.record("tasks")
    for task in tasks:
        features = known.record(task)
        for name in PREDICTORS:
            features.number(name)
    for _, row in record.record("shifts", optional=True).records():
        for task in row.values:
            if row.has(task):  # null where an adapter's own modules put out nothing
                row.number(task, 0.0)


def _parts(unit: Unit) -> tuple[str, ...]:
    return (TUNING,) if unit.split == TUNING else tuple(HALVES)


def _scale(record: Record) -> None:
    record.number("scale", 0.0, _LARGEST_SCALE, above=True)


def _scores(record: Record, tasks: Collection[str]) -> None:
    for task in dict.fromkeys([*tasks, *record.values]):
        record.number(task, _LEAST, _MOST)


def _rows(record: Record, key: str) -> list[Record]:
    """The objects of a list, which is not empty."""
    values: Any = record.values.get(key)
    if not isinstance(values, list) or not values:
        raise record.wrong(key, values, "a list of objects")
    place = f"{record.inside}.{key}"
    return [Record.of(v, record.where, inside=f"{place}[{i}]", hint=_HINT) for i, v in enumerate(values)]
