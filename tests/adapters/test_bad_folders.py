"""Damaged, incomplete, hostile and unsupported adapter folders: one typed error each, and nothing is touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, read_adapter, write_adapter
from plait.adapters.tensors import read_tensors, write_tensors
from plait.errors import InputError
from plait.store import MANIFEST, identity, sha256_file, staged_folder

ROOT = "base_model.model.bert.layer."
Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder of two modules, with a head and a manifest."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"layer.{m}": LoraFactors(torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator), 2.0)
        for m in ("query", "value")
    }
    heads = {"topic": {"classifier.weight": torch.randn(3, 4, generator=generator)}}
    with staged_folder(tmp_path / "topic", identity("adapter", {})) as stage:
        write_adapter(stage, Adapter("topic", "some/base", modules, "SEQ_CLS", "bert", heads))
    return tmp_path / "topic"


def refused(folder: Path, message: str, names: str = "topic") -> InputError:
    """Reading raises one InputError with these words, within a second, and changes no file."""
    before = {p: (p.lstat().st_mtime_ns, p.is_file() and sha256_file(p)) for p in folder.rglob("*")}
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as raised:
        read_adapter(folder)
    assert time.monotonic() - started < 5.0
    assert {p: (p.lstat().st_mtime_ns, p.is_file() and sha256_file(p)) for p in folder.rglob("*")} == before
    assert raised.value.exit_code == 3 and names in str(raised.value) and str(raised.value).isprintable()
    return raised.value


def unsealed(folder: Path) -> Path:
    """Without a manifest, as folders from elsewhere are: the hash does not give the damage away."""
    (folder / MANIFEST).unlink()
    return folder


def weights(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)


def header(folder: Path, change: Callable[[dict], object]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    found = json.loads(raw[8 : 8 + size])
    change(found)
    text = json.dumps(found).encode()
    weights(folder, struct.pack("<Q", len(text)) + text + raw[8 + size :])


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


def config(folder: Path, **changed: object) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **changed}))


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
    "header that nests": (lambda f: weights(f, struct.pack("<Q", 200_000) + b"[" * 200_000), "header is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FILES)
def test_damaged_weights(folder, damage):
    make, message = FILES[damage]
    make(unsealed(folder))
    refused(folder, message, WEIGHTS)


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


def test_no_weights_or_only_a_pickle(folder):
    unsealed(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "safe_serialization" in str(refused(folder, "pickle formats are not read").hint)
    (folder / "adapter_model.bin").unlink()
    refused(folder, f"no {WEIGHTS}")
    with pytest.raises(InputError, match="no such adapter folder"):
        read_adapter(folder / "absent")


def test_14_a_flipped_bit_is_found(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    weights(folder, bytes(raw))
    refused(folder, "not those the manifest recorded", WEIGHTS)


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
    import plait.adapters.tensors as module

    real = module.safe_open

    def replaced(path, framework):
        found = real(path, framework=framework)
        shutil.copy(path, str(path) + ".new")
        os.replace(str(path) + ".new", path)
        return found

    monkeypatch.setattr(module, "safe_open", replaced)
    with pytest.raises(InputError, match="changed while it was read"):
        read_adapter(folder)


def test_a_cache_of_links_is_read(folder, tmp_path):
    linked = tmp_path / "snapshot"  # the hub's cache is made of links out of the folder
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert read_adapter(linked).modules.keys() == read_adapter(folder).modules.keys()


# --- config: items 10 to 13, 24 to 28 ---------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Damage, str]] = {
    "10 not UTF-8": (lambda f: (f / CONFIG).write_bytes(b'{"r": "\xff"}'), "not UTF-8"),
    "11 deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "11 huge": (lambda f: (f / CONFIG).write_text(" " * (17 << 20)), "at most"),
    "11 a list": (lambda f: (f / CONFIG).write_text("[1]"), "not a JSON object"),
    "11 a key twice": (lambda f: (f / CONFIG).write_text('{"r": 1, "r": 2}'), "duplicate key 'r'"),
    **{f"12 alpha {a!r:.20}": (lambda f, a=a: config(f, lora_alpha=a), "lora_alpha is") for a in
       (float("nan"), float("inf"), -1, 0, "16", True, [16], 10**400, 1e300)},
    **{f"13 r {r!r:.20}": (lambda f, r=r: config(f, r=r), "r is") for r in (0, -1, 10**9, 2.0, "2", True)},
    "13 rank_pattern": (lambda f: config(f, rank_pattern={"query": 0}), r"rank_pattern\[query\]"),
    "24 alpha_pattern": (lambda f: config(f, alpha_pattern={"query": "x"}), r"alpha_pattern\[query\]"),
    "24 a pattern that is a list": (lambda f: config(f, rank_pattern=["query"]), "rank_pattern is not an object"),
    "36 a bad regex": (lambda f: config(f, rank_pattern={"que(ry": 2}), "is not a regex"),
    "36 an endless regex": (lambda f: config(f, rank_pattern={"([a-z.]+)+x": 2}), "take forever"),
    "36 a slow regex": (lambda f: config(f, rank_pattern={".*" * 9 + "x": 2}), "take forever"),
    "25 not LoRA": (lambda f: config(f, peft_type="IA3"), "only LORA"),
    "25 DoRA": (lambda f: config(f, use_dora=True), "DoRA"),
    "25 lora_bias": (lambda f: config(f, lora_bias=True), "lora_bias"),
    "25 bias": (lambda f: config(f, bias="all"), "bias='all'"),
    "25 aLoRA": (lambda f: config(f, alora_invocation_tokens=[1]), "aLoRA"),
    "25 KaSA": (lambda f: config(f, kasa_config={"a": 1}), "KaSA"),
    "25 BD-LoRA": (lambda f: config(f, use_bdlora=True), "BD-LoRA"),
    "26 PiSSA": (lambda f: config(f, init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "26 OLoRA": (lambda f: config(f, init_lora_weights="OLoRA"), "changed the base weights"),
    "26 LoftQ": (lambda f: config(f, init_lora_weights="loftq"), "changed the base weights"),
    "28 QALoRA": (lambda f: config(f, use_qalora=True), "QALoRA"),
    "29 fused experts": (lambda f: config(f, target_parameters=["experts.down_proj"]), "fused"),
    "a type that is a list": (lambda f: config(f, task_type=["SEQ_CLS"]), "task_type is not a string"),
    "a revision that is a number": (lambda f: config(f, revision=5), "revision is not a string"),
    "a base that is a number": (lambda f: config(f, base_model_name_or_path=5), "base_model_name_or_path"),
    "targets of numbers": (lambda f: config(f, target_modules=[1]), "target_modules is not a list of strings"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_bad_configs(folder, damage):
    make, message = CONFIGS[damage]
    make(unsealed(folder))
    refused(folder, message, CONFIG)


def test_10_a_byte_order_mark_is_no_damage(folder):
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert read_adapter(folder).rank == 2


# --- tensors: items 16 to 19, 22 to 24, 27, 32 ------------------------------------------------------------------------

A, B = f"{ROOT}query.lora_A.weight", f"{ROOT}query.lora_B.weight"


def filled(found: dict[str, torch.Tensor], value: float) -> None:
    found[A][0, 0] = value


def renamed(prefix: str) -> Damage:
    return lambda f: tensors(f, lambda t: t.update({k.replace("base_model.model.", prefix): t.pop(k) for k in list(t)}))


TENSORS: dict[str, tuple[Damage, str]] = {
    "16 NaN": (lambda f: tensors(f, lambda t: filled(t, float("nan"))), f"{A}.* holds NaN"),
    "16 infinity": (lambda f: tensors(f, lambda t: filled(t, float("-inf"))), f"{A}.* holds NaN or infinity"),
    "17 no B": (lambda f: tensors(f, lambda t: t.pop(B)), r"layer\.query' has no lora_B"),
    "17 none": (lambda f: save_file({"base_model.model.x": torch.ones(1)}, f / WEIGHTS), "holds no LoRA tensors"),
    "18 A alone": (lambda f: tensors(f, lambda t: t.update({f"{ROOT}key.lora_A.weight": torch.ones(2, 6)})), "key' has no lora_B"),
    "19 another r": (lambda f: config(f, r=3), "rank 3 in adapter_config.json disagree"),
    "19 halves that differ": (lambda f: tensors(f, lambda t: t.update({B: torch.ones(4, 3)})), "disagree"),
    "19 no matrix": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(2, 6, 1)})), "expected a floating matrix"),
    "19 integers": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int64)})), "expected a floating matrix"),
    "19 rank 0": (lambda f: tensors(f, lambda t: t.update({A: torch.ones(0, 6), B: torch.ones(4, 0)})), "disagree"),
    "32 compiled": (renamed("base_model.model._orig_mod."), "_orig_mod"),
    "32 FSDP": (renamed("base_model.model._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "32 DDP": (renamed("base_model.model.module."), "module"),
    "32 not PEFT's": (renamed("transformer."), "does not start with"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSORS)
def test_bad_tensors(folder, damage):
    make, message = TENSORS[damage]
    make(unsealed(folder))
    refused(folder, message)


def test_24_patterns_and_rslora_scale_as_in_peft(folder):
    config(
        unsealed(folder), use_rslora=True, lora_alpha=6, alpha_pattern={r"layer\.query": 3}, rank_pattern={"value": 2}
    )
    found = read_adapter(folder)
    assert found.modules["layer.query"].scaling == pytest.approx(3 / 2**0.5)
    assert found.modules["layer.value"].scaling == pytest.approx(6 / 2**0.5)


def test_27_a_head_that_holds_nan_is_named(folder, tmp_path):
    adapter = read_adapter(folder)
    merged = Adapter(
        "merged", "some/base", adapter.modules, "FEATURE_EXTRACTION", "", {"topic": dict(adapter.heads["topic"])}
    )
    (tmp_path / "merged").mkdir()
    write_adapter(tmp_path / "merged", merged)
    save_file({"classifier.weight": torch.full((3, 4), float("nan"))}, tmp_path / "merged/heads/topic.safetensors")
    refused(tmp_path / "merged", "holds NaN", "heads/topic.safetensors")
    with pytest.raises(InputError, match="holds NaN") as raised:
        write_tensors(tmp_path / "x.safetensors", {"w": torch.tensor([float("inf")])})
    assert raised.value.where == "w" and not (tmp_path / "x.safetensors").exists()


# --- shards -----------------------------------------------------------------------------------------------------------

INDEXES = {
    "no weight_map": "{}",
    "not a shard in this folder": '{"weight_map": {"x": "../x.safetensors"}}',
    "not a shard in this folder ": '{"weight_map": {"x": "/etc/passwd"}}',
    "no such file": '{"weight_map": {"x": "absent.safetensors"}}',
    "is in no shard": '{"weight_map": {"x": "a.safetensors"}}',
    "is in two shards": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
}


@pytest.mark.parametrize("message", INDEXES)
def test_bad_shards(folder, message):
    (unsealed(folder) / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text(INDEXES[message])
    refused(folder, message.strip())


def test_good_shards(folder):
    whole = load_file(unsealed(folder) / WEIGHTS)
    expected = read_adapter(folder)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": list(whole)[:3], "b.safetensors": list(whole)[3:]}
    for name, keys in parts.items():
        save_file({k: whole[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    found = read_adapter(folder)
    assert all(
        torch.equal(found.modules[m].A, f.A) and torch.equal(found.modules[m].B, f.B)
        for m, f in expected.modules.items()
    )
