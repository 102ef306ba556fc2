"""Damaged, incomplete, hostile and unsupported adapter folders: one typed error each, and nothing is touched."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from plait.adapters.config import CONFIG
from plait.adapters.peft_format import WEIGHTS, read_adapter
from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.errors import EnvironmentFault, InputError
from tests.adapters.conftest import ROOT, Damage, header, refused, unsealed, weights
from tests.conftest import unprivileged


def test_the_folder_is_good(folder):
    adapter = read_adapter(folder)
    assert list(adapter.modules) == ["layer.query", "layer.value"] and adapter.heads["topic"]


# --- files: items 1 to 9, 14, 15 --------------------------------------------------------------------------------------


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))


def overlapping(found: dict) -> None:
    names = [k for k in found if k != "__metadata__"]
    found[names[1]]["data_offsets"] = found[names[0]]["data_offsets"]


def first(found: dict) -> dict:
    return next(v for k, v in found.items() if k != "__metadata__")


FILES: dict[str, tuple[Damage, str]] = {
    "1 truncated": (lambda f: weights(f, (f / WEIGHTS).read_bytes()[:-9]), "not a whole safetensors file"),
    "1 truncated header": (lambda f: weights(f, (f / WEIGHTS).read_bytes()[:40]), "do not hold a safetensors header"),
    "2 zero bytes": (lambda f: weights(f, b""), "0 bytes do not hold"),
    "3 header of 10^12": (lambda f: weights(f, struct.pack("<Q", 10**12) + b"{}"), "do not hold a safetensors header"),
    "3 header of 2^64-1": (lambda f: weights(f, b"\xff" * 8 + b"{}"), "do not hold a safetensors header"),
    "4 overlapping": (lambda f: header(f, overlapping), "not a whole safetensors file"),
    "4 a hole": (lambda f: weights(f, (f / WEIGHTS).read_bytes() + b"\0" * 16), "not a whole safetensors file"),
    "5 a key twice": (
        lambda f: weights(f, struct.pack("<Q", 20) + b'{"a": {}, "a": {}}  '), "names 'a' twice"),
    "6 HTML": (lambda f: weights(f, b"<!DOCTYPE html><html>not found"), "an HTML page"),
    "6 Git LFS": (lambda f: weights(f, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "7 a pickle": (lambda f: weights(f, pickle.dumps({"a": 1}, protocol=2)), "a pickle"),
    "8 a zip": (zipped, "a zip archive"),
    "header that is a list": (lambda f: weights(f, struct.pack("<Q", 8) + b"[1,2,3] "), "header"),
    "header that nests": (lambda f: weights(f, struct.pack("<Q", 200_000) + b"[" * 200_000), "header is all brackets"),
    "header of nested lists": (lambda f: weights(f, struct.pack("<Q", 200_000) + b"[       " * 25_000), "header is not JSON"),
    "header over its limit": (lambda f: weights(f, struct.pack("<Q", 17 << 20) + b" " * (17 << 20)), "at most 16777216 are read"),
    "a shape that does not fill its bytes": (lambda f: header(f, lambda h: first(h).update(shape=[3, 6])), "does not fill its"),
    "a negative shape": (lambda f: header(f, lambda h: first(h).update(shape=[-2, -6])), "lacks its type, shape or place"),
    "a shape of true": (lambda f: header(f, lambda h: first(h).update(shape=[True, 12])), "lacks its type, shape or place"),
    "offsets that go back": (lambda f: header(f, lambda h: first(h).update(data_offsets=[8, 0])), "ends before it begins"),
    "offsets of 10^400": (lambda f: header(f, lambda h: first(h).update(data_offsets=[0, 10**400])), "lacks its type"),
    "an entry that is none": (lambda f: header(f, lambda h: h.update({"x": 5})), "has no entry"),
    "a long name": (lambda f: header(f, lambda h: h.update({"x" * 600: first(h)})), "a name of 600 characters"),
    "a name with an escape": (lambda f: header(f, lambda h: h.update({"\x1b[31m": first(h)})), "control characters"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FILES)
def test_damaged_weights(folder, damage):
    make, message = FILES[damage]
    make(unsealed(folder))
    refused(folder, message, WEIGHTS)


@pytest.mark.parametrize("text", [b'{"":0},', b"{},", b'"x":[],'])
def test_a_header_of_nothing_but_brackets_is_refused_before_it_is_parsed(folder, text):
    body = b"[" + text * ((16 << 20) // len(text) - 1) + b"0]"
    weights(unsealed(folder), struct.pack("<Q", len(body)) + body)
    refused(folder, "header is all brackets")


@pytest.mark.parametrize("count", [20_000, 40_000])
def test_a_name_that_stands_twice_among_many_is_found_in_linear_time(folder, count):
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    body = b"{" + b",".join(b'"t%d":%b' % (i, entry) for i in range(count)) + b',"t9":' + entry + b"}"
    weights(unsealed(folder), struct.pack("<Q", len(body)) + body)
    refused(folder, "names 't9' twice")


def sparse(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Weights whose data are a hole in the file."""
    found, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(found).encode()
    with (unsealed(folder) / WEIGHTS).open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


GB = 1 << 28  # numbers of four bytes
TB = {"A": [2, 1 << 23], "B": [1 << 23, 2]}  # of 8192 modules
SPARSE = {
    "2 GB of another rank": ({"A": [GB // 6 * 2, 6], "B": [4, 2]}, InputError, "wider than any layer"),
    "2 GB in B": ({"A": [2, 6], "B": [1 << 14, 1 << 15]}, InputError, "the rank in adapter_config.json is 2"),
    "6 GB of width": ({"A": [2, 3 * GB], "B": [4, 2]}, InputError, "wider than any layer"),
    "1 TB": ({f"{i}.{h}": TB[h] for i in range(8192) for h in "AB"}, EnvironmentFault, "free some memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPARSE)
def test_files_of_holes_are_refused_by_their_header_or_for_want_of_memory(folder, case):
    shapes, kind, message = SPARSE[case]
    names = {f"{ROOT}{k.rpartition('.')[0] or 'query'}.lora_{k[-1]}.weight": v for k, v in shapes.items()}
    sparse(folder, names)
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        read_adapter(folder)
    assert time.monotonic() - started < 5


def test_memory_that_the_system_does_not_give_is_an_error_of_the_environment(folder, monkeypatch):
    def none(size: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("plait.adapters.file_bytes.own_block", none)
    with pytest.raises(EnvironmentFault, match="free some memory") as raised:
        read_adapter(unsealed(folder))
    assert str(folder / WEIGHTS) in str(raised.value)


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    for size in (0x280, 0x480):  # little-endian: 80 02 and 80 04, the first bytes of pickles
        path = tmp_path / f"{size}.safetensors"
        tensor = torch.arange(3.0)
        write_tensors(path, {"x": tensor})
        raw = path.read_bytes()
        old = struct.unpack("<Q", raw[:8])[0]
        path.write_bytes(struct.pack("<Q", size) + raw[8 : 8 + old].ljust(size) + raw[8 + old :])
        assert torch.equal(read_tensors(path)[0]["x"], tensor)


def test_9_no_config(folder):
    (folder / CONFIG).unlink()
    refused(folder, f"no {CONFIG}")


def test_a_file_in_the_place_of_a_folder(folder):
    with pytest.raises(InputError, match=r"a file, and a PEFT folder is wanted \(name the folder that it lies in"):
        read_adapter(folder / WEIGHTS)


def test_no_weights_or_only_a_pickle(folder):
    unsealed(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "safe_serialization" in str(refused(folder, "pickle formats are not read").hint)
    (folder / "adapter_model.bin").unlink()
    refused(folder, f"no {WEIGHTS}")
    with pytest.raises(InputError, match=r"no such adapter folder \(check the path\)"):
        read_adapter(folder / "absent")
    misspelt = folder.with_name(f"{folder.name}s")
    with pytest.raises(InputError, match=re.escape(f"no such adapter folder (did you mean {str(folder)!r}?)")):
        read_adapter(misspelt)
    with pytest.raises(InputError, match=r"no such adapter folder \(check the path\)"):
        read_adapter(folder / "absent" / "deeper")


def test_14_a_flipped_bit_is_found(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    weights(folder, bytes(raw))
    refused(folder, "is not what was written", WEIGHTS)


def test_15_pipes_loops_and_a_file_replaced_while_it_is_read(folder, monkeypatch):
    good = (unsealed(folder) / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "not a regular file", WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    refused(folder, "no adapter_model|no such file")
    (folder / WEIGHTS).unlink()
    weights(folder, good)
    import plait.adapters.file_bytes as module

    real = module.safe_open

    def replaced(path, framework):
        found = real(path, framework=framework)
        shutil.copy(path, str(path) + ".new")
        os.replace(str(path) + ".new", path)
        return found

    monkeypatch.setattr(module, "safe_open", replaced)
    with pytest.raises(InputError, match="changed while it was read"):
        read_adapter(folder)


@pytest.mark.parametrize("shut", [f"topic/{WEIGHTS}", f"topic/{CONFIG}", "topic"])
def test_what_only_its_owner_may_read(folder, public_path, shut):
    shutil.copytree(unsealed(folder), public_path / "topic")
    (public_path / "topic").chmod(0o755)
    assert read_adapter(public_path / "topic").modules  # and what that imports is there: others may not read it
    with unprivileged(public_path / shut, 0o000), pytest.raises(InputError, match="may not be read") as raised:
        read_adapter(public_path / "topic")
    assert "chmod" in str(raised.value.hint) and str(public_path / "topic") in str(raised.value)


def test_a_cache_of_links_is_read(folder, tmp_path):
    linked = tmp_path / "snapshot"  # the hub's cache is made of links out of the folder
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert read_adapter(linked).modules.keys() == read_adapter(folder).modules.keys()
