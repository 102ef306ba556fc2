"""Headers of tensor files, read by themselves: names, dtypes and shapes, never a byte of weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import InputError

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own
JSON_LIMIT = 64 << 20
_ITEM = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as its file describes it: dtype as the file writes it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it holds no numbers."""
        return 0 in self.shape


@dataclass(frozen=True, slots=True)
class Header:
    """What a tensor file holds, in the file's order, and the text metadata beside it."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read a safetensors header.

    Raises:
        InputError: Not such a file, longer or shorter than it says, with a name twice, or with tensors that overlap or leave
            bytes to none: the safetensors library refuses it, and with it every loader.
    """
    try:
        size = path.stat().st_size if path.is_file() else -1
        with path.open("rb") if size >= 0 else _no_file(path) as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
            if length > HEADER_LIMIT or 8 + length > size:
                raise InputError("not a safetensors file, or cut off", where=str(path), hint="copy it again")
            text = f.read(length)
    except OSError as e:
        raise InputError(e.strerror or "cannot be read", where=str(path)) from None
    found = _object(text, path)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("__metadata__ is no object of texts", where=str(path))
    room = size - 8 - length
    tensors = {name: _stored(name, entry, room, path) for name, entry in found.items()}
    _require_filled([tuple(entry["data_offsets"]) for entry in found.values()], room, path)
    return Header(tensors, metadata)


def _require_filled(spans: list[tuple[int, int]], room: int, path: Path) -> None:
    """Refuse a file whose tensors do not lie one after another, from its first byte behind the header to its last."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            what = "overlap" if start < end else "leave bytes to none"
            raise InputError(f"its tensors {what} at byte {min(start, end)}", where=str(path), hint="copy it again")
        end = stop
    if end != room:
        what = f"its tensors end at byte {end}, and {room} follow the header"
        raise InputError(what, where=str(path), hint="copy it again")


def _no_file(path: Path) -> Any:
    raise InputError("no such file" if not path.exists() else "not a regular file", where=str(path))


def _stored(name: str, entry: Any, room: int, path: Path) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"its entry for {name!r} has no dtype, shape and offsets", where=str(path))
    count = 1
    for n in shape:
        count *= n
    if stop > room or stop < start or (dtype in _ITEM and stop - start != count * _ITEM[dtype]):
        raise InputError(f"{name!r} is {dtype} {shape} at bytes {start} to {stop} of {room}", where=str(path))
    return Stored(dtype, shape)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: No such file, too large, no JSON, or another value.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(f"JSON of more than {JSON_LIMIT} bytes", where=str(path))
        text = path.read_bytes()
    except OSError as e:
        raise InputError(e.strerror or "cannot be read", where=str(path)) from None
    return _object(text, path)


def _object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as e:
        raise InputError(f"no JSON: {e}", where=str(path)) from None
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=str(path))
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found
