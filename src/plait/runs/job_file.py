"""The job file: one batch of units as JSON, from a file or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plait.border.checked import Json, Record, distinct_keys
from plait.disk.files import read_json
from plait.errors import InputError
from plait.runs.units import ALONE, FEATURES, FOLDS, MERGE, REPAIR, REPAIRED, STATISTICS, TRAIN, TUNING, Unit

SCHEMA = 1
_LARGEST = 8 << 20  # a batch of 10,000 units takes 2 MB
_HINT = "plait job list writes them"
_STAGES = (STATISTICS, TRAIN, ALONE, MERGE, FEATURES, REPAIR, REPAIRED)
_TEXTS = ("arm", "merge", "variant", "pool")


def read_batch(source: str) -> Json:
    """Read and check a batch that `plait job list` wrote.

    Args:
        source: The file's path, or "-" for standard input.

    Returns:
        A batch as `plait.runs.executors.run_batch` takes it.

    Raises:
        InputError: Not such a file; names the key at fault.
    """
    raw = _from_stdin() if source == "-" else read_json(Path(source), _LARGEST)
    where = "standard input" if source == "-" else source
    record = Record.of(raw, where, hint=_HINT)
    record.only(("schema", "study", "out", "units", "until", "overwrite"))
    if record.integer("schema") != SCHEMA:
        raise record.wrong("schema", raw["schema"], f"{SCHEMA}, which this plait reads")
    record.text("out")
    record.record("study")  # checked as every study is, where it is made
    if record.has("until"):
        record.number("until")
    record.flag("overwrite", default=False)
    if not isinstance(raw.get("units"), list):
        raise record.wrong("units", raw.get("units"), "a list of units")
    units_of(raw["units"], where)
    return raw  # type: ignore[no-any-return]


def _from_stdin() -> Any:
    text = sys.stdin.read(_LARGEST + 1) if sys.stdin is not None else ""
    if len(text) > _LARGEST:
        raise InputError(f"more than {_LARGEST} characters", where="standard input", hint=_HINT)
    try:
        return json.loads(text, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as e:
        raise InputError(f"not valid JSON: {e}", where="standard input", hint=_HINT) from None


def units_of(listed: Iterable[Any], where: str) -> list[Unit]:
    """The units of a batch, checked.

    Raises:
        InputError: One is no unit; names it and its key.
    """
    found = []
    for i, one in enumerate(listed):
        record = Record.of(one, where, inside=f"units[{i}]", hint=_HINT)
        record.only(tuple(Unit.__dataclass_fields__))
        texts = {key: record.text(key, "") for key in _TEXTS}
        found.append(
            Unit(
                record.text("stage", choices=_STAGES),
                record.integer("seed"),
                rate=record.number("rate", 0, default=0.0),
                step=record.integer("step", default=0),
                split=record.text("split", "", choices=("", TUNING, FOLDS)),
                samples=record.integer("samples", default=0),
                scale=record.number("scale", default=0.0),
                **texts,
            )
        )
    return found
