"""The header of a safetensors file: read within bounds, and held against the file's length before any tensor is."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from plait.border.checked import DuplicateKey, distinct_keys, encodable, shown
from plait.border.counts import plural
from plait.errors import InputError

# 18,000 modules of a mixture of experts, each with two factors, take 6 MB; a hundred times the text in Python's objects.
LARGEST_HEADER = 16 << 20
LONGEST_NAME = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LARGEST_SIDE = 1 << 48
_DENSITY = 8  # bytes a bracket at least: a tensor's entry has three in 50 bytes
ADVICE = "download or save it again as safetensors; pickle formats are not read"
_SIGNATURES = (
    (b"\x80\x02", "a pickle (torch.save)"),
    (b"\x80\x04", "a pickle"),
    (b"PK\x03\x04", "a zip archive (torch.save)"),
    (b"version https://git-lfs", "a Git LFS pointer: the real file was not downloaded"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
)

# Name of a type in a header -> bytes of one number.
ITEMSIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
# The same types -> torch's names for them.
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


def read_header(f: FileIO, path: Path, length: int) -> tuple[dict[str, Any], bytes]:
    """What the header says of each tensor, and the bytes before the data.

    Args:
        f: The file, at its beginning.
        path: For messages.
        length: Of the file in bytes.

    Returns:
        Name -> {"dtype", "shape", "data_offsets"} without the metadata, and the header's bytes with its length.

    Raises:
        InputError: Something else than safetensors, too large, or offsets that do not cover the data once, in one piece.

    Cost: linear in the header.
    """
    start = f.read(512)
    for signature, what in _SIGNATURES:
        if start.startswith(signature) and start[8:9] != b"{":  # a header of 640 bytes starts like a pickle
            raise InputError(f"{what}, not safetensors", where=str(path), hint=ADVICE)
    size = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 8 or size > length - 8:
        raise InputError(
            f"{plural(length, 'byte', 'does', 'do')} not hold a safetensors header",
            where=str(path),
            hint=ADVICE,
        )
    if size > LARGEST_HEADER:
        raise InputError(
            f"a header of {plural(size, 'byte')}, at most {LARGEST_HEADER} are read", where=str(path), hint=ADVICE
        )
    f.seek(0)
    head = f.read(8 + size)
    if head.count(b"{") + head.count(b"[") > size // _DENSITY + 16:
        raise InputError("not a whole safetensors file: its header is all brackets", where=str(path), hint=ADVICE)
    try:  # the library keeps the last of two entries with one name
        found = json.loads(head[8:], object_pairs_hook=distinct_keys)
    except DuplicateKey as e:
        raise InputError(f"the header names {shown(e.key)} twice", where=str(path), hint=ADVICE) from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"header is not JSON: {e}", where=str(path), hint=ADVICE) from None
    if not isinstance(found, dict):
        raise InputError("not a whole safetensors file: its header is no object", where=str(path), hint=ADVICE)
    entries = {k: v for k, v in found.items() if k != "__metadata__"}
    _require_layout(entries, length - len(head), path)
    return entries, head


def _require_layout(entries: Mapping[str, Any], length: int, path: Path) -> None:
    """Refuse tensors whose offsets do not fit shape and type, or do not cover the data once."""
    places: list[tuple[int, int]] = []
    for name, entry in entries.items():
        wrong = _wrong_in(name, entry)
        if wrong:
            raise InputError(
                f"not a whole safetensors file: tensor {shown(name)} {wrong}", where=str(path), hint=ADVICE
            )
        start, stop = entry["data_offsets"]
        places.append((start, stop))
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise InputError(
                f"not a whole safetensors file: its tensors {'overlap' if start < end else 'leave a hole'} at byte {start}",
                where=str(path),
                hint=ADVICE,
            )
        end = stop
    if end != length:
        raise InputError(
            f"not a whole safetensors file: its header speaks of {plural(end, 'byte')}, and {length} follow",
            where=str(path),
            hint=ADVICE,
        )


def _wrong_in(name: str, entry: Any) -> str:
    """What is wrong with one entry of a header; "" where nothing is."""
    if len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} characters, at most {LONGEST_NAME} are read"
    if not encodable(name) or _CONTROL.search(name):
        return "has a name with control characters"
    if not isinstance(entry, dict):
        return "has no entry"
    kind: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return "lacks its type, shape or place"
    if offsets[0] > offsets[1]:
        return "ends before it begins"
    size = ITEMSIZES.get(kind)
    if size is not None and math.prod(shape) * size != offsets[1] - offsets[0]:
        return f"of shape {shape} does not fill its {plural(offsets[1] - offsets[0], 'byte')}"
    return ""


def _are_sizes(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) <= 16
    return whole and all(type(v) is int and 0 <= v <= _LARGEST_SIDE for v in value)
