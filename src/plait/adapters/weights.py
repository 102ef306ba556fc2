"""The weights of a PEFT folder: one file or several, hashed while they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.file_bytes import Check
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.header import LARGEST_HEADER
from plait.border.checked import shown
from plait.disk.files import read_json
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"


def read_weights(folder: Path, check: Check | None = None) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """A folder's tensors, their metadata, and the hash of each file; `check`: see `begin_tensors`."""
    with Hashing() as hashing:
        tensors, metadata, digests = begin_weights(folder, hashing, check)
        return tensors, metadata, {file: digest() for file, digest in digests.items()}


Begin = Callable[
    ..., "tuple[dict[str, Any], dict[str, str], Digest]"
]  # as `begin_tensors`, of torch's tensors or arrays


def with_torch() -> Begin:
    """The way to read a file as torch's tensors."""
    from plait.adapters.tensors import begin_tensors

    return begin_tensors


def begin_weights(
    folder: Path, hashing: Hashing | None, check: Check | None = None, begin: Begin | None = None
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Digest]]:
    """As `read_weights`, but for the hashes, which may be on their way yet; without `hashing` there are none.

    `check` is told the shapes of each file before its tensors are read; `begin` reads one, by default as torch's tensors.
    """
    begin = begin or with_torch()
    if (folder / WEIGHTS).exists():
        tensors, metadata, digest = begin(folder / WEIGHTS, hashing, finite=True, check=check)
        return tensors, metadata, {WEIGHTS: digest} if hashing else {}
    if (folder / INDEX).exists():
        tensors, digests = _begin_shards(folder, hashing, check, begin)
        return tensors, {}, digests if hashing else {}
    if (folder / "adapter_model.bin").exists():
        raise InputError(
            "adapter_model.bin is a pickle and pickle formats are not read",
            where=str(folder),
            hint="load it once with PEFT in an environment you trust and save_pretrained(safe_serialization=True)",
        )
    raise InputError(f"no {WEIGHTS}", where=str(folder))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index has it."""
    index = read_json(folder / INDEX, limit=LARGEST_HEADER)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        raise InputError("no weight_map from tensor to file", where=str(folder / INDEX))
    return files


def shards(folder: Path) -> list[str]:
    """The files that an index names, by name.

    Raises:
        InputError: No index, or one that names something else than shards in this folder.
    """
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"weight_map points to {shown(file)}, not a shard in this folder", where=str(folder / INDEX)
            )
    return files


def _begin_shards(
    folder: Path, hashing: Hashing | None, check: Check | None, begin: Begin
) -> tuple[dict[str, Tensor], dict[str, Digest]]:
    files = _weight_map(folder)
    tensors: dict[str, Tensor] = {}
    digests: dict[str, Digest] = {}
    for file in shards(folder):
        found, _, digests[file] = begin(folder / file, hashing, finite=True, check=check)
        if twice := sorted(set(found) & set(tensors)):
            raise InputError(f"tensor {twice[0]!r} is in two shards", where=str(folder / file))
        tensors |= found
    if missing := sorted(set(files) - set(tensors)):
        raise InputError(f"{missing[0]} is in no shard", where=str(folder / INDEX))
    return tensors, digests
