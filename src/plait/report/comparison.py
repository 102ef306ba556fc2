"""Two runs side by side: what the second scores against the first, task by task, and what was set otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.errors import UsageError
from plait.evaluation.bootstrap import Floats
from plait.evaluation.evaluate import is_open
from plait.evaluation.splits import HALVES
from plait.report.account import RESAMPLES
from plait.report.best import Best, best_rows
from plait.report.inference import Interval, Resampled, resample
from plait.report.table import rows_of
from plait.runs.folder import layout_of_folder, published
from plait.runs.layout import Layout
from plait.runs.stages import splits

if TYPE_CHECKING:
    from plait.report.table import Row

__all__ = ["BEST", "Change", "Side", "TwoRuns", "compare_runs"]
BEST = "best"  # each run's best arm under its best merge


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs.

    Args:
        name: Name of its folder.
        best: Its arms under their best merges, the best first.
    """

    name: str
    best: Sequence[Best]


@dataclass(frozen=True, slots=True)
class Change:
    """What an arm under a merge scores in the second run against the first, on the tasks that both have.

    Args:
        arm, merge: Coordinates; both `BEST` for the best of each run.
        first, second: Mean scores, percent.
        difference: `second` minus `first`, points.
        interval: 95 % interval of the difference over seeds and examples; None where nothing was resampled.
        tasks: Task -> difference; `intervals`: task -> its interval.
    """

    arm: str
    merge: str
    first: float
    second: float
    difference: float
    interval: Interval | None
    tasks: Mapping[str, float]
    intervals: Mapping[str, Interval | None]


@dataclass(frozen=True, slots=True)
class TwoRuns:
    """Two finished runs in numbers.

    Args:
        sides: The first and the second.
        tasks: Tasks of both.
        paired: Whether both answered the same rows of the same split with the same seeds, so that draws are shared.
        resamples: Number of draws.
        changes: The best of each first, then every arm and merge that both have.
        settings: Key of the recipe -> its value in both, where these differ; None where a run does not set it.
        missing: Arms, merges and tasks of one run alone, a sentence each.
    """

    sides: tuple[Side, Side]
    tasks: Sequence[str]
    paired: bool
    resamples: int
    changes: Sequence[Change]
    settings: Mapping[str, tuple[Any, Any]]
    missing: Sequence[str]


def compare_runs(first: Path, second: Path) -> TwoRuns:
    """Compare two finished runs; neither their bases nor their data need be there.

    Where both scored the same rows with the same seeds, the same draws of seeds and examples are taken in both: the interval is
    that of a paired bootstrap. Else each has its own draws, and the interval is wider. Tasks are not drawn: what is said holds
    of these.

    Raises:
        InputError: A folder is no run.
        RunError: A run is not finished.
        UsageError: They have no task in common.
    """
    folders, layouts = (first, second), [layout_of_folder(f) for f in (first, second)]
    rows = [[r for r in rows_of(layout) if not r.variant] for layout in layouts]
    tasks = [t for t in layouts[0].tasks if t in layouts[1].tasks]
    if not tasks:
        names = (", ".join(layout.tasks) for layout in layouts)
        raise UsageError("the two runs have no task in common", hint=" and ".join(names))
    sides = [Side(f.resolve().name, best_rows(r)) for f, r in zip(folders, rows, strict=True)]
    both = [k for k in _pairs(rows[0]) if k in _pairs(rows[1])]
    paired = _same_rows(*layouts)
    drawn = [
        resample(layout, _wanted(side, both), RESAMPLES, stream=0 if paired else i)
        for i, (layout, side) in enumerate(zip(layouts, sides, strict=True))
    ]
    places = [[list(layout.tasks).index(t) for t in tasks] for layout in layouts]
    changes = [_change(drawn, sides, places, tasks, *key) for key in [(BEST, BEST), *both]]
    return TwoRuns(
        (sides[0], sides[1]), tasks, paired, RESAMPLES, changes, _settings(*layouts), _missing(layouts, rows)
    )


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r.arm, r.method) for r in rows))


def _wanted(side: Side, both: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Mapping[str, str]]:
    wanted: dict[tuple[str, str], Mapping[str, str]] = {(side.best[0].arm, BEST): side.best[0].merges}
    return wanted | {(arm, merge): dict.fromkeys(HALVES, merge) for arm, merge in both}


def _same_rows(first: Layout, second: Layout) -> bool:
    """Whether the same draws mean the same rows and seeds in both runs."""
    one, other = (layout.recipe for layout in (first, second))
    if (one.seeds, one.evaluation.split_seed, list(first.tasks)) != (
        other.seeds,
        other.evaluation.split_seed,
        list(second.tasks),
    ):
        return False
    parts, others = splits(first), splits(second)
    return all(
        np.array_equal(parts[t].halves[h], others[t].halves[h]) and same_labels(first, second, t)
        for t in first.tasks
        for h in HALVES
    )


def same_labels(first: Layout, second: Layout, task: str) -> bool:
    """Whether a task's rows are scored against the same in two runs; of answers that are written, whether the files are the same."""
    if is_open(first.tasks[task]) or is_open(second.tasks[task]):  # nothing of such answers is kept
        return bool(first.data[task]["source"] == second.data[task]["source"])
    return np.array_equal(first.labels(task), second.labels(task))


def _change(
    drawn: Sequence[Resampled],
    sides: Sequence[Side],
    places: Sequence[list[int]],
    tasks: Sequence[str],
    arm: str,
    merge: str,
) -> Change:
    scores = []
    for one, side, place in zip(drawn, sides, places, strict=True):
        key = (side.best[0].arm, BEST) if arm == BEST else (arm, merge)
        each: Floats = one.scores(*key)[1:][place]
        scores.append(np.concatenate([each.mean(0, keepdims=True), each]))
    differences = scores[1] - scores[0]
    intervals = [_interval(row) for row in differences]
    values = [float(row[0]) for row in differences]
    return Change(
        arm=arm,
        merge=merge,
        first=float(scores[0][0, 0]),
        second=float(scores[1][0, 0]),
        difference=values[0],
        interval=intervals[0],
        tasks=dict(zip(tasks, values[1:], strict=True)),
        intervals=dict(zip(tasks, intervals[1:], strict=True)),
    )


def _interval(values: Floats) -> Interval | None:
    usable = values[1:][np.isfinite(values[1:])]
    if len(usable) < 2:
        return None
    low, high = np.quantile(usable, [0.025, 0.975])
    return float(low), float(high)


def _settings(first: Layout, second: Layout) -> dict[str, tuple[Any, Any]]:
    one, other = (_flat(layout.recipe.model_dump(mode="json")) for layout in (first, second))
    keys = [k for k in dict.fromkeys([*one, *other]) if one.get(k) != other.get(k)]
    return {k: (one.get(k), other.get(k)) for k in keys}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Leaves of a recipe by their dotted keys; entries of lists that have names go by these; folders by their last name."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        items = {v["name"]: {k: x for k, x in v.items() if k != "name"} for v in value}.items()
    else:
        return {key: published(value) if isinstance(value, str) else value}
    leaves: dict[str, Any] = {}
    for name, part in items:
        leaves |= _flat(part, f"{key}.{name}".removeprefix("."))
    return leaves


def _missing(layouts: Sequence[Layout], rows: Sequence[Sequence[Row]]) -> list[str]:
    sentences = []
    kinds = {
        "arms": [[r.arm for r in side] for side in rows],
        "merges": [[r.method for r in side] for side in rows],
        "tasks": [list(layout.tasks) for layout in layouts],
    }
    for kind, (one, other) in kinds.items():
        for name, mine, theirs in (("A", one, other), ("B", other, one)):
            if alone := [x for x in dict.fromkeys(mine) if x not in theirs]:
                sentences.append(f"Only in {name}: {kind} {', '.join(f'`{x}`' for x in alone)}.")
    return sentences
