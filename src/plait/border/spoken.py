"""What a command says on stdout: one JSON object with `--json`, else lines that a person reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from plait.border.records import to_json
from plait.errors import printable

SCHEMA = 1


def spoken(result: Any, as_json: bool, text: str) -> str:
    """A result, a record or a mapping as one JSON object, or its text with everything that a terminal would obey escaped."""
    if as_json:
        result = to_json(result) if is_dataclass(result) else result
        return json.dumps(jsonable({"schema": SCHEMA, **result}), allow_nan=False, ensure_ascii=True)
    # names of bases and paths come from elsewhere; an escape has at most 10 characters
    return "\n".join(printable(line, 10 * len(line)) for line in text.split("\n"))


def jsonable(value: Any) -> Any:
    """The same value as JSON can hold it: NaN and infinity as null, paths and tuples as text and lists."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
