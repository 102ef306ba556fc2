"""The header of a GGUF file: its values and its tensors' names, dtypes and shapes."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plait.errors import InputError
from plait.loading.header import Stored

GGUF_MAGIC = b"GGUF"
_COUNT, _TEXT, _ITEMS = 1 << 20, 1 << 24, 1 << 22
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: "F32", 1: "F16", 8: "Q8_0", 28: "F64", 30: "BF16"}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says: scalar values and texts (arrays as their length), and tensors with shapes as rows x columns."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def read_gguf(path: Path) -> GgufHeader:
    """Read a GGUF header, version 2 or 3, little-endian.

    Raises:
        InputError: Not such a file, cut off, or beyond the bounds of one.
    """
    try:
        with path.open("rb") as f:
            magic, version, tensors, pairs = struct.unpack("<4sIQQ", _bytes(f, 24))
            if magic != GGUF_MAGIC or version not in (2, 3) or max(tensors, pairs) > _COUNT:
                raise InputError(f"not a GGUF file of version 2 or 3 ({magic!r}, {version})", where=str(path))
            values = {_text(f): _value(f, _number(f, "I")) for _ in range(pairs)}
            return GgufHeader(values, dict(_tensor(f) for _ in range(tensors)))
    except (struct.error, ValueError, KeyError) as e:
        raise InputError(f"its header is damaged: {e}", where=str(path), hint="copy it again") from None
    except OSError as e:
        raise InputError(e.strerror or "cannot be read", where=str(path)) from None


def _bytes(f: BinaryIO, count: int) -> bytes:
    found = f.read(count)
    if len(found) < count:
        raise ValueError("it ends too early")
    return found


def _number(f: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", _bytes(f, struct.calcsize(f"<{kind}")))[0]


def _text(f: BinaryIO) -> str:
    length = _number(f, "Q")
    if length > _TEXT:
        raise ValueError(f"a text of {length} bytes")
    return _bytes(f, length).decode("utf-8", "replace")


def _value(f: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(f)
    if kind != _ARRAY:
        return _number(f, _SCALARS[kind])
    inner, count = _number(f, "I"), _number(f, "Q")
    if count > _ITEMS:
        raise ValueError(f"an array of {count} values")
    if inner == _STRING:
        for _ in range(count):
            _text(f)
    else:
        _bytes(f, count * struct.calcsize(f"<{_SCALARS[inner]}"))
    return count


def _tensor(f: BinaryIO) -> tuple[str, Stored]:
    name, dimensions = _text(f), _number(f, "I")
    if dimensions > 8:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    sizes = [_number(f, "Q") for _ in range(dimensions)]
    dtype, _ = _number(f, "I"), _number(f, "Q")
    if math.prod(sizes) > 1 << 50:
        raise ValueError(f"a tensor of {math.prod(sizes)} numbers")
    return name, Stored(_DTYPES.get(dtype, f"type {dtype}"), tuple(reversed(sizes)))
