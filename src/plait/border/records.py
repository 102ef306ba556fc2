"""Records as JSON and back: rooms hand frozen dataclasses to each other, files and ``--json`` hold what these two make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from plait.errors import InputError

R = TypeVar("R")
_OPTIONAL, _INLINE, _KIND, _KEY, _MAPPING = "optional", "inline", "kind", "key", "mapping"


def optional(default: Any = None, *, kind: type | None = None) -> Any:
    """Declare a field that JSON leaves out while it has its default.

    Args:
        default: Value of the field where a file has no such key.
        kind: Dataclass of the value, or of each of a tuple's.
    """
    return field(default=default, metadata={_OPTIONAL: True, _KIND: kind})


def keyed(key: str, default: Any = "") -> Any:
    """Declare a field whose key in JSON is no name in Python, such as "from".

    Args:
        key: The key.
        default: Value of the field where a file has no such key.
    """
    return field(default=default, metadata={_KEY: key})


def nested(kind: type, default: Any = MISSING) -> Any:
    """Declare a field that holds a dataclass, or a tuple of them.

    Args:
        kind: The dataclass.
        default: Value of the field where a file has no such key.
    """
    return field(default=default, metadata={_KIND: kind})


def mapping(kind: type) -> Any:
    """Declare a field that maps names to dataclasses, empty where a file has no such key."""
    return field(default_factory=dict, metadata={_KIND: kind, _MAPPING: True})


def inline(kind: type | None = None) -> Any:
    """Declare a field whose own keys stand beside those of the record in JSON.

    Args:
        kind: Its dataclass, every field of which has a default; None for a mapping, which takes the keys that no other field has.
    """
    return field(default_factory=kind or dict, metadata={_INLINE: True, _KIND: kind})


def to_json(record: Any) -> dict[str, Any]:
    """Turn a record into what JSON can hold: one key a field, nested records as mappings, tuples as lists, paths as text."""
    found: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if f.metadata.get(_OPTIONAL) and value == f.default:
            continue
        found |= (_plain(value) or {}) if f.metadata.get(_INLINE) else {f.metadata.get(_KEY, f.name): _plain(value)}
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[R], values: Mapping[str, Any], where: str | None = None) -> R:
    """Make a record of a mapping from a file; keys that no field has are passed over.

    Args:
        kind: The record's class.
        values: Parsed JSON.
        where: The file, for the message.

    Raises:
        InputError: A key is missing that has no default, or a nested record is none.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"its record is no {kind.__name__}", where=where, hint="--overwrite, or another --out")
    parts = fields(kind)  # type: ignore[arg-type]  # every record is a dataclass
    named = {f.metadata.get(_KEY, f.name) for f in parts}
    found = {}
    for f in parts:
        if f.metadata.get(_INLINE):
            inside = f.metadata[_KIND]
            rest = {k: v for k, v in values.items() if k not in named}
            found[f.name] = from_json(inside, rest, where) if inside else rest
        elif (key := f.metadata.get(_KEY, f.name)) in values:
            found[f.name] = _read(f, values[key], where)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"its record says nothing of {key}", where=where, hint="--overwrite, or another --out")
    return kind(**found)


def _read(f: Field[Any], value: Any, where: str | None) -> Any:
    kind = f.metadata.get(_KIND)
    if isinstance(value, list | tuple):
        return tuple(from_json(kind, v, where) for v in value) if kind else tuple(value)
    if kind and f.metadata.get(_MAPPING) and isinstance(value, Mapping):
        return {name: from_json(kind, v, where) for name, v in value.items()}
    return from_json(kind, value, where) if kind and value is not None else value
