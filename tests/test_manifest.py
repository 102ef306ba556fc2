"""A folder against its manifest: what was changed, lost or added is named, and nothing damaged is read as if it were whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.disk.files import sha256_file
from plait.disk.manifest import CARD, MANIFEST, Fault, compare_with_manifest, read_manifest, require_whole
from plait.disk.store import identity, is_done, staged_folder
from plait.errors import Damaged, InputError, PlaitError
from tests.conftest import unprivileged

WANTED = identity("merge", {"scale": 1, "weights": [0.5, 1.25]}, {"adapter:a": "0" * 64}, 7)


def a_folder(path: Path, modules: int = 2, heads: int = 2) -> Path:
    """A small adapter folder of plait's: factors, heads, config and manifest."""
    made = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float32)

    adapter = Adapter(
        name="both",
        base="org/base",
        modules={f"layer.{i}.query": LoraFactors(noise(2, 8), noise(8, 2), 2.0) for i in range(modules)},
        task_type="SEQ_CLS",
        prefix="bert",
        heads={f"task{i}": {"classifier.weight": noise(2, 8), "classifier.bias": noise(2)} for i in range(heads)},
    )
    result = {"tasks": ["task0", "task1"], "verification_error": 1.5e-9, "nested": {1: (2, 3), 10: None}}
    with staged_folder(path, WANTED, result=result) as stage:
        write_adapter(stage, adapter)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_folder(tmp_path / "merged")


def content(adapter: Adapter, folder: Path) -> object:
    """Everything that reading an adapter gives, and what the folder's record says."""
    tensors = {m: (f.A.numpy().tobytes(), f.B.numpy().tobytes(), f.scaling, f.kind) for m, f in adapter.modules.items()}
    heads = {t: {k: v.numpy().tobytes() for k, v in h.items()} for t, h in adapter.heads.items()}
    facts = (adapter.name, adapter.base, adapter.revision, adapter.task_type, adapter.prefix, adapter.target_modules)
    source = {k: v for k, v in adapter.source.items() if k != "sha256"}
    manifest = read_manifest(folder)
    return tensors, heads, facts, sorted(adapter.extras), adapter.fan_in_fan_out, source, manifest


def listed(folder: Path) -> list[str]:
    return [*(read_manifest(folder) or {})["files"], MANIFEST]


# --- what is compared -------------------------------------------------------------------------------------------------


def test_a_whole_folder_has_no_fault_and_its_manifest_lists_everything(folder):
    manifest = read_manifest(folder)
    lying = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, CARD)
    )
    assert sorted(manifest["files"]) == sorted(manifest["sizes"]) == lying and len(lying) == 4
    assert all(sha256_file(folder / n) == d for n, d in manifest["files"].items())
    assert all((folder / n).stat().st_size == size for n, size in manifest["sizes"].items())
    for read in (True, False):
        assert compare_with_manifest(folder, read=read) == ()


CHANGES = {
    "gone": lambda f: f.unlink(),
    "longer": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "empty": lambda f: f.write_bytes(b""),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "a pipe": lambda f: (f.unlink(), os.mkfifo(f)),
    "a dead link": lambda f: (f.unlink(), f.symlink_to("nowhere")),
}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "heads/task1.safetensors"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_listed_file_is_there_and_of_its_size(folder, file, change):
    CHANGES[change](folder / file)
    for read in (True, False):
        assert [f.file for f in compare_with_manifest(folder, read=read)] == [file]
    with pytest.raises(Damaged, match=file.rpartition("/")[2]) as raised:
        is_done(folder, WANTED)
    assert raised.value.exit_code == 3
    with pytest.raises(InputError):
        read_adapter(folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "heads/task0.safetensors"])
def test_other_bytes_of_the_same_length_are_seen_where_bytes_are_read(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    assert compare_with_manifest(folder, read=False) == () and is_done(folder, WANTED)
    (fault,) = compare_with_manifest(folder, read=True)
    assert fault.file == file and "SHA-256" in fault.what
    for call in (lambda: read_adapter(folder), lambda: is_done(folder, WANTED, read=True)):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("file", ["heads/task2.safetensors", "adapter_model.safetensors.index.json", "sub/notes.txt"])
def test_what_is_not_listed_is_a_fault(folder, file):
    (folder / file).parent.mkdir(exist_ok=True)
    shutil.copyfile(folder / "heads/task0.safetensors", folder / file)
    assert compare_with_manifest(folder, read=False) == (Fault(file, "is not listed in the manifest"),)
    with pytest.raises(Damaged, match="not listed"):
        read_adapter(folder)


def test_a_card_and_what_tools_leave_may_lie_there(folder):
    before = content(read_adapter(folder), folder)
    (folder / "README.md").write_text("a card")
    (folder / "LICENSE").write_text("a licence")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/x.lock").write_text("")
    (folder / "heads/.DS_Store").write_bytes(b"\0")
    (folder / "empty").mkdir()
    assert compare_with_manifest(folder, read=True) == () and content(read_adapter(folder), folder) == before
    (folder / "heads/README.md").write_text("no card of the folder")
    assert [f.file for f in compare_with_manifest(folder, read=False)] == ["heads/README.md"]


def test_a_card_that_was_written_with_the_folder_may_be_edited_too(tmp_path):
    with staged_folder(tmp_path / "out", WANTED) as stage:
        (stage / "README.md").write_text("card")
        (stage / "sub").mkdir()
        (stage / "sub" / MANIFEST).write_text("another folder's")
        (stage / ".hidden").write_text("x")
    assert set((read_manifest(tmp_path / "out") or {})["files"]) == {f"sub/{MANIFEST}", ".hidden"}
    (tmp_path / "out/README.md").write_text("edited")
    assert compare_with_manifest(tmp_path / "out", read=True) == ()
    (tmp_path / "out/.hidden").unlink()
    assert compare_with_manifest(tmp_path / "out", read=False) == (Fault(".hidden", "is gone"),)


def test_several_faults_are_counted(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "heads/task0.safetensors").write_bytes(b"")
    (folder / "more").write_text("x")
    assert [f.file for f in compare_with_manifest(folder, read=False)] == [
        "adapter_config.json",
        "heads/task0.safetensors",
        "more",
    ]
    with pytest.raises(Damaged, match="and 2 more of its files"):
        require_whole(folder, read=False)


def test_known_hashes_are_compared_without_reading(folder):
    weights = "adapter_model.safetensors"
    assert compare_with_manifest(folder, read=False, known={weights: "f" * 64})[0].file == weights
    assert compare_with_manifest(folder, read=False, known={weights: sha256_file(folder / weights)}) == ()


def test_heads_that_may_not_be_read_are_refused(public_path):
    folder = a_folder(public_path / "merged")
    with unprivileged(folder / "heads", 0o700), pytest.raises(InputError, match=r"may not be read"):
        read_adapter(folder)
    with unprivileged(folder / "heads", 0o700):
        assert compare_with_manifest(folder, read=False)[0] == Fault("heads", "cannot be read: Permission denied")
    (folder / MANIFEST).unlink()
    with unprivileged(folder / "heads", 0o700), pytest.raises(InputError, match=r"may not be read"):
        read_adapter(folder)


# --- folders within a result, of earlier versions, and of others ------------------------------------------------------


def test_an_adapter_inside_a_result_is_held_against_the_result(tmp_path):
    made = read_adapter(a_folder(tmp_path / "made"))
    with staged_folder(tmp_path / "out", WANTED) as stage:
        for part in ("unet", "steps/000010"):
            (stage / part).mkdir(parents=True)
            write_adapter(stage / part, made)
    for part in ("unet", "steps/000010"):
        inside = tmp_path / "out" / part
        assert compare_with_manifest(inside, read=True) == ()
        read_adapter(inside)
        data = bytearray((inside / "heads/task0.safetensors").read_bytes())
        data[-1] ^= 64
        (inside / "heads/task0.safetensors").write_bytes(data)
        assert [f.file for f in compare_with_manifest(inside, read=True)] == ["heads/task0.safetensors"]
        with pytest.raises(Damaged, match="task0"):
            read_adapter(inside)
    shutil.copytree(tmp_path / "made", tmp_path / "out/else")
    (tmp_path / "out/else" / MANIFEST).unlink()
    assert compare_with_manifest(tmp_path / "out/else", read=True) == ()  # the result above does not speak of it


def test_manifests_of_earlier_versions_are_read_and_their_hashes_compared(folder):
    found = json.loads((folder / MANIFEST).read_text())
    del found["sizes"], found["manifest_sha256"]
    (folder / MANIFEST).write_text(json.dumps(found))
    assert read_manifest(folder) == found and compare_with_manifest(folder, read=True) == ()
    assert is_done(folder, WANTED, read=True) and read_adapter(folder).heads
    data = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(data.replace(b'"lora_alpha": 4', b'"lora_alpha": 8'))
    with pytest.raises(Damaged, match=r"adapter_config\.json"):
        read_adapter(folder)


@pytest.mark.parametrize("key", ["sizes", "manifest_sha256"])
def test_a_manifest_with_half_of_what_it_says_of_itself_is_none(folder, key):
    found = json.loads((folder / MANIFEST).read_text())
    del found[key]
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(Damaged, match="digest"):
        read_manifest(folder)
    assert [f.file for f in compare_with_manifest(folder, read=False)] == [MANIFEST]


@pytest.mark.parametrize("name", ["../else", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_manifest_names_files_inside_its_folder(folder, name):
    found = json.loads((folder / MANIFEST).read_text())
    del found["sizes"], found["manifest_sha256"]
    found["files"][name] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(Damaged, match="not a plait manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("value", [None, 3, "x", ["a"], "A" * 64, {"size": 1}])
def test_a_manifest_maps_files_to_hashes(folder, value):
    found = json.loads((folder / MANIFEST).read_text())
    del found["sizes"], found["manifest_sha256"]
    found["files"]["adapter_config.json"] = value
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(Damaged, match="not a plait manifest"):
        read_adapter(folder)


def test_folders_without_a_manifest_are_read_as_they_are(folder):
    (folder / MANIFEST).unlink()
    (folder / "notes.txt").write_text("mine")
    assert compare_with_manifest(folder, read=True) == () and len(read_adapter(folder).heads) == 2


# --- every byte -------------------------------------------------------------------------------------------------------


def unnoticed(folder: Path, bits: dict[str, list[tuple[int, int]]]) -> tuple[int, list[str]]:
    """Flip single bits and read: how many were noticed, and those after which something was read with another meaning."""
    before = content(read_adapter(folder), folder)
    noticed, fell = 0, []
    for file, places in bits.items():
        path = folder / file
        whole = path.read_bytes()
        for place, bit in places:
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                if content(read_adapter(folder), folder) != before:
                    fell.append(f"{file} byte {place} bit {bit}")
            except PlaitError as e:
                noticed += 1
                assert e.exit_code == 3 and str(folder) in str(e)
        path.write_bytes(whole)
    return noticed, fell


def flips(folder: Path, *, sampled: int | None) -> dict[str, list[tuple[int, int]]]:
    """Each byte once, at a random bit, and all bits of config and manifest; or so many of these, drawn at random."""
    drawn = np.random.default_rng(0)
    found = {}
    for file in listed(folder):
        size = (folder / file).stat().st_size
        every = file.endswith(".json")
        places = [(i, b) for i in range(size) for b in (range(8) if every else [int(drawn.integers(8))])]
        if sampled is not None:
            places = [places[i] for i in sorted(drawn.choice(len(places), sampled, replace=False))]
        found[file] = places
    return found


def test_flipped_bits_are_noticed_or_change_nothing(folder):
    bits = flips(folder, sampled=60)
    noticed, fell = unnoticed(folder, bits)
    assert not fell and noticed >= 0.9 * sum(map(len, bits.values()))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_flipped_byte_is_noticed_or_changes_nothing(tmp_path):
    folder = a_folder(tmp_path / "merged", modules=5)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    bits = flips(folder, sampled=None)
    noticed, fell = unnoticed(folder, bits)
    assert 3500 < size < 6000 and sum(map(len, bits.values())) > size
    assert not fell and noticed >= 0.95 * sum(map(len, bits.values()))
