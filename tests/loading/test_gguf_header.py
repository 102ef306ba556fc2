"""The header of a GGUF file, put together here byte by byte: values of every kind, arrays passed over as their length, tensors."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from plait.errors import InputError
from plait.loading.gguf import read_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def array(inner: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", inner, count) + data


def file(
    path: Path, pairs: list[tuple[str, int, bytes]], tensors: bytes = b"", count: int = 0, version: int = 3
) -> Path:
    body = b"".join(text(key) + struct.pack("<I", kind) + data for key, kind, data in pairs)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, count, len(pairs)) + body + tensors)
    return path


def tensor(name: str, *sizes: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, 0)


PAIRS = [
    ("small", 0, struct.pack("<B", 200)),
    ("sixteen", 3, struct.pack("<h", -300)),
    ("alpha", 6, struct.pack("<f", 16.0)),
    ("yes", 7, struct.pack("<?", True)),
    ("many", 10, struct.pack("<Q", 1 << 40)),
    ("double", 12, struct.pack("<d", 0.1)),
    ("texts", 9, array(8, 2, text("a") + text("bcd"))),
    ("floats", 9, array(6, 3, struct.pack("<3f", 1, 2, 3))),
    ("bytes", 9, array(0, 5, b"\xff" * 5)),
    ("wide", 9, array(11, 2, struct.pack("<2q", -1, 1 << 60))),
    ("none", 9, array(4, 0, b"")),
    ("last", 8, text("é")),
]


@pytest.mark.parametrize("version", [2, 3])
def test_values_arrays_and_tensors(version, tmp_path):
    tensors = tensor("a", 6, 4) + tensor("b", 4, kind=30) + tensor("c", 2, 3, 5, kind=99)
    found = read_gguf(file(tmp_path / "x.gguf", PAIRS, tensors, 3, version))
    assert dict(found.values) == {
        "small": 200, "sixteen": -300, "alpha": 16.0, "yes": True, "many": 1 << 40, "double": 0.1,
        "texts": 2, "floats": 3, "bytes": 5, "wide": 2, "none": 0, "last": "é",
    }  # fmt: skip
    stored = {name: (t.dtype, t.shape) for name, t in found.tensors.items()}
    assert stored == {"a": ("F32", (4, 6)), "b": ("BF16", (4,)), "c": ("type 99", (5, 3, 2))}


@pytest.mark.parametrize(
    ("pairs", "tensors", "count", "said"),
    [
        ([("a", 9, array(9, 1, b""))], b"", 0, "its header is damaged"),  # arrays of arrays are none of GGUF's
        ([("a", 9, array(0, (1 << 22) + 1, b""))], b"", 0, "an array of 4194305 values"),
        ([("a", 8, struct.pack("<Q", (1 << 24) + 1))], b"", 0, "a text of 16777217 bytes"),
        ([("a", 9, array(6, 3, b"\0" * 11))], b"", 0, "it ends too early"),
        ([("a", 13, b"\0" * 8)], b"", 0, "its header is damaged: 13"),
        ([], tensor("t", *[1] * 9), 1, "a tensor of 9 dimensions"),
        ([], tensor("t", 1 << 26, 1 << 25), 1, "a tensor of"),
    ],
)
def test_what_is_beyond_its_bounds_is_damaged(pairs, tensors, count, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_gguf(file(tmp_path / "x.gguf", pairs, tensors, count))


def test_the_bounds_themselves_are_allowed(tmp_path):
    whole = [("a", 9, array(0, 1 << 22, bytes(1 << 22))), ("t", 8, text("x" * (1 << 16)))]
    found = read_gguf(file(tmp_path / "x.gguf", whole, tensor("t", *[1] * 7, 1 << 50), 1))
    assert (found.values["a"], found.tensors["t"].shape) == (1 << 22, (1 << 50, *[1] * 7))
    for magic, version in ((b"GGUF", 1), (b"GGUF", 4), (b"GGJT", 3)):
        (tmp_path / "y.gguf").write_bytes(struct.pack("<4sIQQ", magic, version, 0, 0))
        with pytest.raises(InputError, match="not a GGUF file of version 2 or 3"):
            read_gguf(tmp_path / "y.gguf")
