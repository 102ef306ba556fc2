"""Changes to valid files where their structure is: values, keys, shapes, offsets, texts inside texts, and plain bytes."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.0, 50, -5.5, 1e-300, 1e300, 1e999, float("nan"), float("-inf"), 10**40,
    10**400, 2**31, 2**53, 2**63, 2**64, -(2**63), "", "0", "1", "false", "true", "null", "nan", "16", "a", "A", "..", "../x", "/",
    "/etc/passwd", "a/b", "a\0b", "\ud800", "\u202e", "\n", "\x1b[31m", "é", "x" * 300, "x" * 5000, ".*.*.*.*zz", "(a|a)*b", "(?i)q", "(",
    "(?=a)\\1", [], [[]], [None], [1], ["a"], ["a", "a"], [1, 2], [2, 2], [-1, 5], [0, 0], [1e999], [[1]], {}, {"a": 1}, {"": None},
    {"a": {"a": {}}}, {"x": [1]}, "linear", "ties", "dense", "factor", "F32", "F8_E4M3", "I64", "BOOL", "LORA", "SEQ_CLS", "pissa",
    "all-linear", "merge", "cpu", "cuda", "tpu", "none", "all", 10**9, 1 << 24, 65537,
]  # fmt: skip


ODD_YAML = [
    "!!timestamp x", "!!bool x", "!!float x", "!!int x", "2026-99-99", "&a [*a]", "*p", "? {a: 1}", "!!python/object:os.system x",
    "<<: 1", "1_000", "0o8", "0x", ".inf", "-.INF", ".nan", "1:60", "9" * 5000, "1e400", "!!binary x", "!!set {a}", "~", "'", "\t",
]  # fmt: skip


def tree(value: Any, rng: random.Random, times: int | None = None) -> Any:
    """A copy of a JSON-like value with one to three changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng)
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        _places(inner, found)
    return found


def _changed(value: Any, rng: random.Random) -> Any:
    places = _places(value, [])
    if not places or rng.random() < 0.01:
        return copy.deepcopy(rng.choice(WEIRD))
    parent, key = rng.choice(places)
    how = rng.random()
    if how < 0.55:
        parent[key] = copy.deepcopy(rng.choice(WEIRD))
    elif how < 0.65:
        parent.pop(key)
    elif how < 0.72:
        other, at = rng.choice(places)
        parent[key] = copy.deepcopy(other[at])
    elif how < 0.78:
        parent[key] = [parent[key]]
    elif how < 0.84 and isinstance(parent, dict):
        new = rng.choice([w for w in WEIRD if isinstance(w, str)])
        parent[new if rng.random() < 0.5 else key + new[:3]] = parent.pop(key)
    elif how < 0.9 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif isinstance(parent[key], str):
        parent[key] = text(parent[key], rng)
    elif isinstance(parent[key], int | float):
        with contextlib.suppress(OverflowError):
            parent[key] = parent[key] * rng.choice((-1, 2, 1.5, 10**9)) + rng.choice((0, 1, -1))
    return value


def text(value: str, rng: random.Random) -> str:
    """A text with one character changed, a piece doubled or cut out."""
    at, to = sorted((rng.randrange(len(value) + 1), rng.randrange(len(value) + 1)))
    return rng.choice(
        [
            value[:at] + rng.choice('\0\n"{}[]:,&*!%#.|()?+-0aZé\ud800') + value[to if rng.random() < 0.3 else at :],
            value[:at] + value[to:],
            value[:to] + value[at:to] + value[to:],
        ]
    )


def raw(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four changes: flipped, cut, doubled, overwritten."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not found:
            break
        at = rng.randrange(len(found))
        how = rng.random()
        if how < 0.5:
            found[at] ^= 1 << rng.randrange(8)
        elif how < 0.65:
            del found[at : at + rng.choice((1, 1, 4, 100))]
        elif how < 0.8:
            found[at:at] = found[at : at + rng.choice((1, 4, 50))]
        elif how < 0.9:
            found[at : at + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", at)))
        else:
            del found[at:]
    return bytes(found)


def jsonable(value: Any) -> bytes:
    """A tree as JSON text, halves of surrogate pairs and all."""
    return json.dumps(value).encode()


def json_file(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with its tree changed, or its bytes."""
    return raw(data, rng) if rng.random() < 0.1 else jsonable(tree(json.loads(data), rng))


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file changed in its metadata, in its header, in its layout or in its bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.random()
    if how < 0.08:
        return raw(data, rng)
    if how < 0.45 and header.get("__metadata__"):
        header["__metadata__"] = _metadata(header["__metadata__"], rng)
    elif how < 0.65:
        header = tree(header, rng)
    elif how < 0.9:
        header, body = _relaid(header, body, rng)
    else:
        body = raw(body, rng)
    out = jsonable(header)
    return struct.pack("<Q", len(out)) + out + body


def _metadata(found: dict[str, str], rng: random.Random) -> Any:
    """Metadata whose values are JSON in JSON: the inner tree changed, and hashes of it left out, so that it is looked at."""
    found = dict(found)
    key = rng.choice(list(found))
    try:
        inner = json.loads(found[key])
    except ValueError:
        return tree(found, rng)
    found[key] = json.dumps(tree(inner, rng))
    if rng.random() < 0.9:
        found.pop(f"{key}_sha256", None)
    if rng.random() < 0.8 and isinstance(inner, dict):  # sites' hashes would be the first to tell
        found[key] = found[key].replace('"sha256"', '"sha256_"')
    return found


def _relaid(header: dict[str, Any], body: bytes, rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """The tensors renamed, left out, cast or cut to another shape, laid out anew so that the layout is whole."""
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    new: dict[str, Any] = {k: v for k, v in header.items() if k == "__metadata__"}
    pieces: list[bytes] = []
    chosen, end = rng.choice(list(tensors)), 0
    change = rng.choice((_dtype, _shape, _name, _gone, _twice, _numbers))
    for name, entry in tensors.items():
        start, stop = entry["data_offsets"]
        entries = [(name, entry["dtype"], entry["shape"], body[start:stop])]
        for n, dtype, shape, data in change(entries[0], rng) if name == chosen else entries:
            new[n] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
            pieces.append(data)
    return new, b"".join(pieces)


Entry = tuple[str, str, list[int], bytes]
_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I8": 1,
    "U16": 2,
    "BOOL": 1,
    "C64": 8,
}


def _dtype(e: Entry, rng: random.Random) -> list[Entry]:
    kind = rng.choice(list(_SIZES))
    count = 1
    for d in e[2]:
        count *= d
    return [(e[0], kind, e[2], (e[3] * 8)[: count * _SIZES[kind]])]


def _shape(e: Entry, rng: random.Random) -> list[Entry]:
    shape = rng.choice(
        [[*e[2], 1], e[2][::-1], [], [0, *e[2]], [1, *e[2]], [len(e[3]) // 4], [2, 2], [d + 1 for d in e[2]], e[2][:1]]
    )
    count = 4
    for d in shape:
        count *= d
    return [(e[0], "F32", shape, (e[3] * 9)[:count].ljust(count, b"\0"))]


def _name(e: Entry, rng: random.Random) -> list[Entry]:
    return [(text(e[0], rng), *e[1:])]


def _gone(e: Entry, rng: random.Random) -> list[Entry]:
    return []


def _twice(e: Entry, rng: random.Random) -> list[Entry]:
    return [e, (text(e[0], rng), *e[1:])]


def _numbers(e: Entry, rng: random.Random) -> list[Entry]:
    bad = rng.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\x01\0\0\0", b"\0\0\x80\xbf")
    )
    data = bytearray(e[3])
    if len(data) >= 4:
        at = 4 * rng.randrange(len(data) // 4)
        data[at : at + 4] = bad
    return [(*e[:3], bytes(data))]


def _called_as_another(value: Any, rng: random.Random) -> None:
    """A key gets the name of another of the file, wherever that stands; changed in place."""
    keyed = [(parent, key) for parent, key in _places(value, []) if isinstance(parent, dict)]
    parent, key = rng.choice(keyed)
    parent[rng.choice(keyed)[1]] = parent.pop(key)


def yaml_file(load: Callable[[bytes], Any], dump: Callable[[Any], str]) -> Callable[[bytes, random.Random], bytes]:
    """A mutation of YAML files: of the tree, or of the text, where tags, anchors and odd scalars go in."""

    def change(data: bytes, rng: random.Random) -> bytes:
        how = rng.random()
        if how < 0.1:
            return raw(data, rng)
        if how < 0.3:
            words = data.decode().split(" ")
            words[rng.randrange(len(words))] = rng.choice(ODD_YAML)
            return " ".join(words).encode()
        value = load(data)
        if rng.random() < 0.15:
            _called_as_another(value, rng)
        return dump(tree(value, rng)).encode("utf-8", "surrogatepass")

    return change
