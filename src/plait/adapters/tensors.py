"""Reading safetensors strictly: one layout check more than the library, and errors that say what the file is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.adapters.arrays import widened as widened
from plait.adapters.file_bytes import Check as Check
from plait.adapters.file_bytes import begin_bytes
from plait.adapters.file_bytes import read_layout as read_layout
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.header import ADVICE, TORCH_NAMES
from plait.adapters.memory import let_go
from plait.border.checked import shown
from plait.disk.store import require_regular
from plait.errors import InputError


def read_tensors(path: Path, *, finite: bool = False) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read a whole safetensors file: once, into one buffer that all its tensors are views of.

    Args:
        path: The file.
        finite: Whether to refuse NaN and infinity.

    Returns:
        Tensors by name in file order, the metadata, and the SHA-256 of the file's bytes.

    Raises:
        InputError: Not safetensors (the message says what it is instead), damaged, with a name twice, replaced while it
            was read, or not finite.
    """
    with Hashing() as hashing:
        tensors, metadata, digest = begin_tensors(path, hashing, finite=finite)
        return tensors, metadata, digest()


def begin_tensors(
    path: Path, hashing: Hashing | None, *, finite: bool = False, check: Check | None = None
) -> tuple[dict[str, Tensor], dict[str, str], Digest]:
    """As `read_tensors`, but for the hash, which may be on its way yet: the last of what is returned waits for it.

    Args:
        path: The file.
        hashing: Hashes the bytes, which are read into memory of our own, while the next ones are read; None where no hash
            is wanted (it is ""): then the file is mapped, so nobody else may write it while the tensors are in use.
        finite: Whether to refuse NaN and infinity.
        check: Told the shape of every tensor before any is read, to refuse a file that cannot be what it should.
    """
    found = begin_bytes(path, hashing, check)
    data = torch.frombuffer(found.buffer, dtype=torch.uint8)[found.start : found.stop] if found.stop else _nothing()
    tensors = _views(data, found.entries, path)
    if finite:
        _require_finite(data, tensors, path)
        if hashing is None:  # what is mapped need not stay in memory until it is asked for
            let_go(data)
    return tensors, found.metadata, found.digest


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata, without its tensors.

    Raises:
        InputError: As in `read_tensors`.
    """
    return read_layout(path)[0]


def type_of(name: str, entry: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype of a header's entry.

    Raises:
        InputError: One that is not read.
    """
    if entry["dtype"] not in TORCH_NAMES:
        raise InputError(f"tensor {name!r} is of type {shown(entry['dtype'])}, which is not read", where=str(path))
    kind: torch.dtype = getattr(torch, TORCH_NAMES[entry["dtype"]])
    return kind


def read_some(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of the named tensors that a safetensors file holds.

    Raises:
        InputError: The file is gone, damaged or replaced by something else.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as opened:
            known = set(opened.keys())
            return {n: opened.get_tensor(n) for n in names if n in known}
    except SafetensorError as e:
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=ADVICE) from None


def _views(data: Tensor, entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, none of them copied but where a writer did not align them."""
    order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    types = [type_of(name, entry, path) for name, entry in order]
    sizes = [stop - start for _, entry in order for start, stop in [entry["data_offsets"]]]
    # "unsafe" only in that autograd does not know the parts as views of one tensor, so that each may be changed in place.
    if len(set(types)) == 1 and data.storage_offset() % types[0].itemsize == 0:  # a third of the time, as one view
        parts = torch.unsafe_split_with_sizes(data.view(types[0]), [size // types[0].itemsize for size in sizes])
    else:
        pieces = zip(torch.unsafe_split_with_sizes(data, sizes), types, strict=True)
        parts = tuple((p if p.storage_offset() % t.itemsize == 0 else p.clone()).view(t) for p, t in pieces)
    return {name: part.view(entry["shape"]) for (name, entry), part in zip(order, parts, strict=True)}


def _require_finite(data: Tensor, tensors: Mapping[str, Tensor], path: Path) -> None:
    """One look at the whole buffer where its tensors are of one type, and at each of them only to say which it is."""
    types = {t.dtype for t in tensors.values()}
    only = types.pop() if len(types) == 1 else None
    whole = only is not None and all(int(n) % only.itemsize == 0 for n in (data.numel(), data.storage_offset()))
    if only is not None and whole and all_finite(data.view(only)):
        return
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise InputError(f"tensor {name!r} holds NaN or infinity", where=str(path))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A finite sum proves it at a tenth of the cost of looking at every entry; one that is not may have overflowed. NumPy
    adds up in this thread alone: waking torch's for a quarter of a megabyte takes longer than the sum.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # torch neither adds up nor judges 8 bit floats
        return bool(torch.isfinite(tensor.float()).all())
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(tensor.detach().numpy().sum())
    else:
        total = float(tensor.sum())
    return math.isfinite(total) or bool(torch.isfinite(tensor).all())
