"""Damaged, foreign and older statistics files: one typed error each, whole or site by site, and nothing is written."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import pytest

from plait.adapters.tensor_file import write_tensors
from plait.adapters.tensors import read_tensors
from plait.cli import main
from plait.errors import InputError
from plait.runs.single.start import StatisticsFiles, initialise_from_files
from plait.statistics import collect_statistics, open_statistics, read_statistics, write_statistics
from plait.statistics.files import read_identity
from plait.subspaces.start import InitialSettings
from tests.statistics.models import batches, build


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = build("roberta")
    for i, task in enumerate(("mine", "other")):
        found = collect_statistics(model, batches("roberta", i, examples=24), ["query"], provenance={"task": task})
        write_statistics(folder / f"{task}.stats.safetensors", found)
    return folder


def header(raw, change):
    size = struct.unpack("<Q", raw[:8])[0]
    found = json.loads(raw[8 : 8 + size])
    change(found)
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def overlapping(found):
    names = [k for k in found if k != "__metadata__"]
    found[names[1]]["data_offsets"] = found[names[0]]["data_offsets"]


def metadata(change):
    return lambda raw: header(raw, lambda found: change(found["__metadata__"]))


def schema(number):
    def change(record):
        record["statistics"] = json.dumps({**json.loads(record["statistics"]), "schema": number})
        record.pop("statistics_sha256")

    return metadata(change)


DAMAGE = {
    "1 truncated": (lambda raw: raw[:-9], "not a whole safetensors file"),
    "1 truncated header": (lambda raw: raw[:40], "do not hold a safetensors header"),
    "2 zero bytes": (lambda _: b"", "0 bytes do not hold"),
    "3 header of 10^12": (lambda _: struct.pack("<Q", 10**12) + b"{}", "do not hold a safetensors header"),
    "4 overlapping": (lambda raw: header(raw, overlapping), "not a whole safetensors file"),
    "4 a hole": (lambda raw: raw + b"\0" * 16, "not a whole safetensors file"),
    "5 a key twice": (lambda _: struct.pack("<Q", 20) + b'{"a": {}, "a": {}}  ', "names 'a' twice"),
    "6 HTML": (lambda _: b"<!DOCTYPE html><html>not found", "an HTML page"),
    "6 Git LFS": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "7 a pickle": (lambda _: pickle.dumps({"a": 1}, protocol=2), "a pickle"),
    "14 a flipped bit": (lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], "not those that were written"),
    "14 a changed count": (
        metadata(lambda m: m.update(statistics=m["statistics"].replace('"padded_count": ', '"padded_count": 1'))),
        "not the one that was written",
    ),
    "57 newer": (schema(3), "schema 3, this plait reads 1 and 2"),
    "57 older": (schema(None), "schema None, this plait reads 1 and 2"),
    "no record": (metadata(lambda m: m.update(statistics="[]", statistics_sha256="")), "record is not JSON"),
    "other things": (metadata(lambda m: m.update(kind="cake")), "holds no statistics"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage, good, tmp_path, capsys):
    change, message = DAMAGE[damage]
    path = tmp_path / "other.stats.safetensors"
    path.write_bytes(change((good / "other.stats.safetensors").read_bytes()))
    before = path.read_bytes()
    for read in (read_statistics, lambda p: list(open_statistics(p).sites.values())):
        with pytest.raises(InputError, match=message) as refused:
            read(path)
        assert str(path) in str(refused.value) and str(refused.value).isprintable()
    with pytest.raises(InputError, match=message):
        mine = good / "mine.stats.safetensors"
        initialise_from_files(StatisticsFiles(mine, [path]), InitialSettings(rank=2), tmp_path / "out")
    for command in (
        ["show", path],
        ["check", path],
        ["diff", path, path],
        ["merge", good / "mine.stats.safetensors", path, "--out", tmp_path / "x"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["stats", *map(str, command)])
        assert ended.value.code == 3
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name] and path.read_bytes() == before


def test_8_a_zip_and_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="a zip archive"):
        open_statistics(tmp_path / "zip")
    with pytest.raises(InputError, match="not a regular file"):
        open_statistics(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_statistics(tmp_path / "absent")


def test_files_without_hashes_are_read(good, tmp_path):
    tensors, record, _ = read_tensors(good / "mine.stats.safetensors")
    plain = json.loads(record["statistics"])
    for site in plain["sites"].values():
        del site["sha256"]
    write_tensors(tmp_path / "old", tensors, {"kind": record["kind"], "statistics": json.dumps(plain)})
    assert read_statistics(tmp_path / "old").provenance["task"] == "mine"


@pytest.mark.parametrize("value", ["NaN", "1e999", '"another"', "[]"])
def test_an_identity_that_is_not_the_one_written(good, tmp_path, value):
    path = tmp_path / "x.stats.safetensors"
    write_statistics(path, read_statistics(good / "mine.stats.safetensors"), identity={"options": {"samples": 4}})
    assert read_identity(path) == {"options": {"samples": 4}}
    path.write_bytes(metadata(lambda m: m.update(identity=m["identity"].replace("4", value)))(path.read_bytes()))
    with pytest.raises(InputError, match="its identity is not the one"):
        read_identity(path)
