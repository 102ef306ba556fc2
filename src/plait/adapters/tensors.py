"""Reading safetensors strictly: one layout check more than the library, and errors that say what the file is."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.adapters.hashing import PIECE, Digest, Hashing, Pieces
from plait.adapters.memory import bytes_of, own_memory
from plait.errors import InputError
from plait.store import require_regular

_HEADER_LIMIT = 100 << 20
_ADVICE = "download or save it again as safetensors; pickle formats are not read"
_SIGNATURES = (
    (b"\x80\x02", "a pickle (torch.save)"),
    (b"\x80\x04", "a pickle"),
    (b"PK\x03\x04", "a zip archive (torch.save)"),
    (b"version https://git-lfs", "a Git LFS pointer: the real file was not downloaded"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


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
    path: Path, hashing: Hashing | None, *, finite: bool = False
) -> tuple[dict[str, Tensor], dict[str, str], Digest]:
    """As `read_tensors`, but for the hash, which may be on its way yet: the last of what is returned waits for it.

    Args:
        path: The file.
        hashing: Hashes the bytes, which are read into memory of our own, while the next ones are read; None where no hash
            is wanted (it is ""): then the file is mapped, so nobody else may write it while the tensors are in use.
        finite: Whether to refuse NaN and infinity.
    """
    require_regular(path)
    with path.open("rb", buffering=0) as f:
        before = os.fstat(f.fileno())
        entries, head = _header(f, path, before.st_size)
        digest: Digest = str
        if hashing:
            pieces = hashing.pieces()
            pieces.update(head)
            data = own_memory(before.st_size - len(head))
            whole, digest = _filled(f, data, pieces), pieces.digest
        else:
            data, whole = _mapped(f)[len(head) :], True
    try:  # the library checks the layout: every offset, no overlap, no hole
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
    except SafetensorError as e:
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=_ADVICE) from None
    after = path.stat()
    changed = (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns)
    if changed or not whole:
        raise InputError("changed while it was read", where=str(path), hint="try again when nothing writes it")
    tensors = _views(data, entries, path)
    if finite:
        _require_finite(data, tensors, path)
    return tensors, metadata, digest


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata, without its tensors.

    Raises:
        InputError: As in `read_tensors`.
    """
    return read_layout(path)[0]


def read_layout(path: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """A safetensors file's metadata, what its header says of each tensor, and where the data begin; no tensor is read.

    Raises:
        InputError: As in `read_tensors`.
    """
    require_regular(path)
    try:  # the library checks the layout: every offset, no overlap, no hole
        with path.open("rb", buffering=0) as f:
            entries, head = _header(f, path, path.stat().st_size)
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {}), entries, len(head)
    except SafetensorError as e:
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=_ADVICE) from None


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
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=_ADVICE) from None


def _mapped(f: FileIO) -> Tensor:
    """A file's own pages, copied where somebody changes them."""
    return torch.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _filled(f: FileIO, data: Tensor, pieces: Pieces) -> bool:
    """Read as many bytes as the buffer holds, each piece hashed while the next is read; whether there were that many, no more."""
    rest = bytes_of(data)
    while rest.nbytes and (count := f.readinto(rest[:PIECE])):
        pieces.update(rest[:count])
        rest = rest[count:]
    return not rest.nbytes and not f.read(1)


def _views(data: Tensor, entries: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, none of them copied but where a writer did not align them."""
    order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    for name, entry in order:
        if entry["dtype"] not in DTYPES:
            raise InputError(f"tensor {name!r} is of type {entry['dtype']}, which is not read", where=str(path))
    types = [DTYPES[entry["dtype"]] for _, entry in order]
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
    if only is not None and data.numel() % only.itemsize == 0 and all_finite(data.view(only)):
        return
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise InputError(f"tensor {name!r} holds NaN or infinity", where=str(path))


def _header(f: FileIO, path: Path, length: int) -> tuple[dict[str, Any], bytes]:
    """What the header says of each tensor, and the bytes before the data."""
    start = f.read(512)
    for signature, what in _SIGNATURES:
        if start.startswith(signature) and start[8:9] != b"{":  # a header of 640 bytes starts like a pickle
            raise InputError(f"{what}, not safetensors", where=str(path), hint=_ADVICE)
    size = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 8 or size > min(_HEADER_LIMIT, length - 8):
        raise InputError(f"{length} bytes do not hold a safetensors header", where=str(path), hint=_ADVICE)
    f.seek(0)
    head = f.read(8 + size)
    try:  # the library keeps the last of two entries with one name
        found = json.loads(head[8:], object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"header is not JSON: {e}", where=str(path), hint=_ADVICE) from None
    if not isinstance(found, dict):
        raise InputError("not a whole safetensors file: its header is no object", where=str(path), hint=_ADVICE)
    return {k: v for k, v in found.items() if k != "__metadata__"}, head


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise InputError(f"the header names {twice!r} twice", where=str(path), hint=_ADVICE)
    return found


def widened(tensor: Tensor) -> Tensor:
    """An 8 bit float as float32, which holds each of its values exactly and with which torch can compute; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


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
