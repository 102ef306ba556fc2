"""A good adapter folder, and ways to damage it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import WEIGHTS, read_adapter, write_adapter
from plait.disk.store import MANIFEST, identity, sha256_file, staged_folder
from plait.errors import InputError

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
    """Reading raises one InputError with these words, within five seconds of work, and changes no file."""
    before = {p: (p.lstat().st_mtime_ns, p.is_file() and sha256_file(p)) for p in folder.rglob("*")}
    started = time.process_time()
    with pytest.raises(InputError, match=message) as raised:
        read_adapter(folder)
    assert time.process_time() - started < 5.0
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
