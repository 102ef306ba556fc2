"""What a merge recorded of itself, and what is to change: adapters that come, go, or weigh otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.lora import Adapter
from plait.adapters.naming import split_name
from plait.adapters.sealed import read_sealed
from plait.border.multipliers import checked_multiplier
from plait.border.records import from_json
from plait.disk import store
from plait.disk.hub import adapter_place, cached_folder, split_revision
from plait.errors import InputError, PlaitError, UsageError
from plait.formats.reading import read_any
from plait.formats.recognised import file_record
from plait.merging.record import MergedInput, MergeRecord
from plait.merging.spec import MergeSpec

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN = "merge-auto"  # the stage of a merge whose method was chosen


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a merge.

    Args:
        add: ``PATH`` or ``NAME=PATH`` each.
        remove: Names of its adapters.
        weights: Name -> its new weight; adapters keep theirs otherwise, new ones have 1.
        inputs: Name -> where an adapter is now, if it has moved.
        scale: Of the merge, if it is to change.
        statistics: As `merge` takes them, for methods that need any.
    """

    add: Sequence[str] = ()
    remove: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    scale: float | None = None
    statistics: Mapping[str, Path | str] | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A merge's recipe as its folder or file recorded it.

    Args:
        path: Of the merge.
        options: What identified it: method, options, weights, scale, rank, calibrate, base, format.
        seed: Its seed.
        inputs: "adapter:NAME" and "statistics:TASK" -> hash.
        record: The whole record; its adapters are the inputs in order.
    """

    path: Path
    options: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    record: MergeRecord

    @property
    def adapters(self) -> tuple[MergedInput, ...]:
        """Its inputs in order."""
        return self.record.adapters

    @property
    def spec(self) -> MergeSpec:
        """How it was merged; on the CPU, where nobody says otherwise."""
        asked = {f.name: self.options[f.name] for f in fields(MergeSpec) if f.name in self.options}
        return MergeSpec(**{"scale": 1.0, **asked, "seed": self.seed, "base": self.base_override})

    @property
    def base_override(self) -> str | None:
        """Name of the base where the inputs' names differ, so that it was given; None where they agree."""
        return str(self.options.get("base")) if len({a.base for a in self.adapters}) > 1 else None


def recorded(path: Path) -> Recorded:
    """Read the recipe of a merge.

    Raises:
        InputError: No merge of plait, or one whose record lacks its inputs.
    """
    found = _record(path)
    if found is not None and found.get("stage") == CHOSEN:
        raise InputError(
            "was chosen by merge auto, and a choice depends on all adapters",
            where=str(path),
            hint="plait merge auto again, with the adapters that you want",
        )
    if found is None or found.get("stage") not in ("merge", "merge-difference"):
        raise InputError(
            "holds no record of a merge", where=str(path), hint="only merges that plait wrote can be changed"
        )
    return _recipe(path, found, "method")


def recorded_choice(path: Path) -> Recorded | None:
    """Read the recipe of a merge that `plait.choosing.auto` chose; None for others.

    Raises:
        InputError: Its record lacks its inputs.
    """
    found = _record(path)
    return _recipe(path, found, "methods") if found is not None and found.get("stage") == CHOSEN else None


def _record(path: Path) -> Mapping[str, Any] | None:
    path = adapter_place(path)
    if path.is_dir():
        return store.read_manifest(path)
    if path.exists():
        return file_record(read_sealed(path)[1], path)
    raise InputError("no such merge", where=str(path))


def _recipe(path: Path, found: Mapping[str, Any], needed: str) -> Recorded:
    result, options = found.get("result", {}), found.get("options", {})
    adapters = result.get("adapters")
    whole = isinstance(adapters, list) and all(_is_input(a) for a in adapters)
    if not whole or needed not in options:
        raise InputError("its record does not name its inputs", where=str(path), hint="merge again from the adapters")
    record = from_json(MergeRecord, result, str(path))
    return Recorded(path, options, int(found.get("seed") or 0), dict(found.get("inputs", {})), record)


def _is_input(entry: object) -> bool:
    """Whether a recorded input says what is needed to find it and to weigh it."""
    if not isinstance(entry, dict) or not {"name", "sha256"} <= entry.keys():
        return False
    weight = entry.get("weight", 1.0)
    return isinstance(weight, int | float) and math.isfinite(weight)


def located(recipe: Recorded, names: Sequence[str], moved: Mapping[str, Path]) -> dict[str, Path]:
    """Find where the named inputs are now: as recorded, beside the merge, or where `moved` says; their bytes decide.

    Raises:
        InputError: One is gone, cannot be read, or is not what was merged; all such are named.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    for entry in recipe.adapters:
        if entry.name not in names:
            continue
        place, why = whereabouts(entry, recipe.path, moved.get(entry.name))
        if place is None:
            problems.append(f"{entry.name!r} {why}")
        else:
            found[entry.name] = place
    if problems:
        raise InputError(
            f"inputs of the merge are not what they were: {'; '.join(problems)}",
            where=str(recipe.path),
            hint="--input NAME=PATH says where one is now; --by-difference needs only those that change",
        )
    return found


def whereabouts(entry: MergedInput, merge: Path, moved: Path | None = None) -> tuple[Path | None, str]:
    """Find where one input of a merge is now: as recorded, beside the merge, in the hub's cache, or where it has moved to.

    Args:
        entry: The input as the merge's record has it.
        merge: Folder or file of the merge.
        moved: Where it is said to be; then nowhere else is looked.

    Returns:
        Its place, and ""; None, and the first place with what is wrong there.
    """
    path, beside = Path(entry.path), merge.absolute().parent
    places = [adapter_place(moved)] if moved else [path, beside / path, beside / path.name, *_cached(entry)]
    verdicts = [_verdict(p, entry.name, entry.sha256) for p in places]
    if "" in verdicts:
        return places[verdicts.index("")], ""
    return None, f"({places[0]}) {next((v for v in verdicts if v != _GONE), _GONE)}"


def _cached(entry: MergedInput) -> list[Path]:
    """Find where an input from the hub lies in this machine's cache."""
    folder = cached_folder(*split_revision(entry.hub)) if entry.hub else None
    return [folder] if folder else []


_GONE = "is gone"


def _verdict(path: Path, name: str, digest: str) -> str:
    """What is wrong with an input; empty if it is the one that was merged."""
    if not path.exists():
        return _GONE
    try:
        return "" if read_any(path, name=name).source["sha256"] == digest else "has changed since"
    except PlaitError as e:
        return f"cannot be read: {e.what}"


def named_weights(recipe: Recorded, change: Change) -> tuple[dict[str, float], dict[str, str]]:
    """Give name -> new weight in the merge's order, kept ones first; and name -> path of each that is added.

    Raises:
        UsageError: An unknown name, one that is there already, a weight out of range, or nothing left.
    """
    kept = {a.name: float(a.weight) for a in recipe.adapters}
    known = ", ".join(kept)
    for name in change.remove:
        if name not in kept:
            raise UsageError(f"no adapter {name!r} in this merge", where=str(recipe.path), hint=f"it has {known}")
        del kept[name]
    added: dict[str, str] = {}
    for given in change.add:
        named, path = split_name(given)
        name = read_any(path).name if named is None else named
        if name in kept or name in added:
            raise UsageError(f"an adapter {name!r} is in this merge already", hint="--add NAME=PATH gives another name")
        added[name] = path
    weights = {**kept, **dict.fromkeys(added, 1.0)}
    if unknown := sorted({*change.weights, *change.inputs} - {*weights, *change.remove}):
        raise UsageError(f"no adapter {unknown[0]!r} in the result", hint=f"it has {', '.join(weights)}")
    if not weights:
        raise UsageError("no adapter is left", where=str(recipe.path))
    asked = {n: checked_multiplier(w, f"the weight of {n!r}") for n, w in change.weights.items()}
    return {n: asked.get(n, w) for n, w in weights.items()}, added


def check_statistics(recipe: Recorded, statistics: Mapping[str, Path | str] | None) -> None:
    """Refuse statistics of tasks in the merge that are not those it was made with, and a cut without those that it was made by.

    Raises:
        InputError: Others.
        UsageError: It was cut in the metric of the inputs, and there are none.
    """
    if recipe.options.get("cut") == "inputs" and not statistics:
        raise UsageError(
            "statistics decided what its cut to rank keeps", where=str(recipe.path), hint="--stats TASK=FILE again"
        )
    for task, path in (statistics or {}).items():
        before = recipe.inputs.get(f"statistics:{task}")
        if before and store.sha256_file(Path(path)) != before:
            raise InputError(f"not the statistics of {task!r} that the merge used", where=str(path))


def without_heads(adapter: Adapter, tasks: Sequence[str]) -> dict[str, Mapping[str, Tensor]]:
    """Give the adapter's heads but for these tasks."""
    return {t: h for t, h in adapter.heads.items() if t not in tasks}
