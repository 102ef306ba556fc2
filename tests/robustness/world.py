"""A small world of valid files, ways to damage it, and what a case of the table is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from plait.adapters.config import CONFIG
from plait.adapters.weights import WEIGHTS
from plait.disk.manifest import MANIFEST
from tests.fuzz import seeds

ROOT = "base_model.model.bert.layer."
Change = Callable[[Path], object]
Around = Callable[[Path], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what is done to the world, what is run in it, and what must come of it.

    Args:
        name: The number in the list of bad inputs (or the finding), and what it is.
        change: Damages the world.
        args: The command, in the world's folder.
        code: Its exit code.
        words: What its one line says: the file, the key, the next step.
        around: Holds while it runs: a full disk, a lock, an interrupt.
        new: What it may leave behind beside what was there.
        waits: Why it is not so yet.
    """

    name: str
    change: Change
    args: Sequence[str]
    code: int
    words: Sequence[str]
    around: Around = field(default=lambda world: contextlib.nullcontext())
    new: Sequence[str] = ()
    waits: str = ""


def build(world: Path) -> None:
    """Two adapters A and B as PEFT writes them, a merge M, statistics, a Fisher file, LoRA files, recipes."""
    plain = seeds.adapter_folders()
    bare = {k: v for k, v in plain[0].items() if k != MANIFEST}
    for name, files in {"A": bare, "B": bare, "M": plain[1]}.items():
        for file, data in files.items():
            (world / name / file).parent.mkdir(parents=True, exist_ok=True)
            (world / name / file).write_bytes(data)
    tensors(world / "B", lambda t: t.update({k: v * 0.5 for k, v in t.items()}))
    for i, data in enumerate(seeds.statistics_files()):
        (world / f"{'ab'[i]}.stats.safetensors").write_bytes(data[""])
    (world / "a.fisher.safetensors").write_bytes(seeds.fisher_files()[1][""])
    for name, data in zip(("kohya", "diffusers", "sealed"), seeds.lora_files(), strict=True):
        (world / f"{name}.safetensors").write_bytes(data[""])
    (world / "recipe.yaml").write_bytes(seeds.RECIPE)
    (world / "study.yaml").write_bytes(seeds.STUDY)
    (world / "mergekit.yaml").write_bytes(seeds.MERGEKITS[0].replace(b"base+a", b"some/base+A").replace(b"base+b", b"some/base+B")
                                          .replace(b"base_model: base", b"base_model: some/base"))  # fmt: skip


def state(world: Path) -> dict[str, str]:
    """Everything that is there: path -> kind and content."""
    found = {}
    for path in sorted(world.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "other"
        digest = (
            hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" and path.stat().st_size < 1 << 28 else ""
        )
        found[str(path.relative_to(world))] = f"{kind} {digest}"
    return found


def config(folder: Path, **changed: object) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **changed}))


def tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


def weights(data: bytes | Callable[[bytes], bytes], file: str = f"A/{WEIGHTS}") -> Change:
    def change(world: Path) -> None:
        path = world / file
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A safetensors file with its header changed in place."""

    def apply(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        found = json.loads(raw[8 : 8 + size])
        change(found)
        text = json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    return apply


def record(file: str, key: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """The JSON in a file's metadata changed, hashes of it left out."""

    def apply(found: dict[str, Any]) -> None:
        inner = json.loads(found["__metadata__"][key])
        change(inner)
        found["__metadata__"][key] = json.dumps(inner)
        found["__metadata__"].pop(f"{key}_sha256", None)

    return weights(header(apply), file)


def sparse(world: Path, shapes: dict[str, list[int]]) -> None:
    """Weights whose data are a hole in the file."""
    found, end = {}, 0
    for name, shape in shapes.items():
        found[f"{ROOT}{name}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [end, end + 4 * shape[0] * shape[1]],
        }
        end += 4 * shape[0] * shape[1]
    text = json.dumps(found).encode()
    with (world / "A" / WEIGHTS).open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


def edit(file: str, old: str, new: str) -> Change:
    """A text replaced in a text file, where it stands."""

    def change(world: Path) -> None:
        text = (world / file).read_text(encoding="utf-8")
        assert old in text
        (world / file).write_text(text.replace(old, new), encoding="utf-8", errors="surrogatepass")

    return change


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
