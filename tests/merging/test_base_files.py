"""Damaged files of a base that is baked into: one typed error each, before anything is written."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError
from plait.merging.bake.baking import bake
from plait.model.files import INDEX, SINGLE
from plait.model.stored import base_tensors


def made(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, stop: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [start, stop]})


DAMAGE = {
    "2 zero bytes": (b"", "0 bytes do not hold"),
    "3 header of 10^12": (struct.pack("<Q", 10**12) + b"{}", "do not hold a safetensors header"),
    "4 overlapping": (made(f'{{"a":{entry([2], 0, 8)},"b":{entry([2], 0, 8)}}}'.encode(), bytes(8)), "not a whole"),
    "4 a hole": (made(f'{{"a":{entry([1], 4, 8)}}}'.encode(), bytes(8)), "not a whole safetensors file"),
    "4 another size than its shape": (made(f'{{"a":{entry([4], 0, 8)}}}'.encode(), bytes(8)), "not a whole"),
    "5 a key twice": (made(f'{{"a":{entry([2], 0, 8)},"a":{entry([2], 0, 8)}}}'.encode(), bytes(8)), "'a' twice"),
    "6 HTML": (b"<!DOCTYPE html><html>not found", "an HTML page"),
    "6 Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "8 a zip": (b"PK\x03\x04" + bytes(60), "a zip archive"),
    "11 a list": (made(b"[1]"), "its header is no object"),
    "11 no entry": (made(b'{"a":1}'), "not a whole safetensors file"),
    "11 an empty entry": (made(b'{"a":{}}'), "not a whole safetensors file"),
    "11 deep": (made(b"[" * 200_000), "its header is all brackets"),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bases_are_named_and_nothing_is_written(tmp_path, damage, shards):
    data, message = DAMAGE[damage]
    base, file = tmp_path / "base", "part-1.safetensors" if shards else SINGLE
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / file).write_bytes(data)
    if shards:
        (base / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    adapter = Adapter("a", str(base), {"a": LoraFactors(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(InputError, match=message) as raised:
        bake(adapter, base, tmp_path / "out")
    assert str(base / file) in str(raised.value) and [p.name for p in tmp_path.iterdir()] == ["base"]


def test_whole_files_are_read_where_their_header_says(tmp_path):
    tensors = {"a": torch.arange(6.0).view(3, 2), "b": torch.arange(4.0).half()}
    save_file(tensors, tmp_path / SINGLE)
    found = base_tensors(tmp_path)
    assert torch.equal(found["a"].read(1, 3), tensors["a"][1:3]) and torch.equal(found["b"].read(0, 4), tensors["b"])
