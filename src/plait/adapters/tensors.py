"""Reading and writing safetensors strictly: one layout check more than the library, and errors that say what the file is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read a whole safetensors file.

    Returns:
        Tensors by name in file order, the metadata, and the SHA-256 of the file's bytes.

    Raises:
        InputError: Not safetensors (the message says what it is instead), damaged, with a name twice, or replaced
            while it was read.
    """
    require_regular(path)
    before = path.stat()
    try:
        with path.open("rb") as f:
            _check_header(f, path)
            f.seek(0)
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise InputError(f"not a whole safetensors file: {e}", where=str(path), hint=_ADVICE) from None
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise InputError("changed while it was read", where=str(path), hint="try again when nothing writes it")
    return tensors, metadata, digest


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata, without its tensors.

    Raises:
        InputError: As in `read_tensors`.
    """
    require_regular(path)
    try:
        with path.open("rb") as f:
            _check_header(f, path)
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
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


def _check_header(f: BinaryIO, path: Path) -> None:
    start = f.read(512)
    for signature, what in _SIGNATURES:
        if start.startswith(signature) and start[8:9] != b"{":  # a header of 640 bytes starts like a pickle
            raise InputError(f"{what}, not safetensors", where=str(path), hint=_ADVICE)
    length = path.stat().st_size
    size = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 8 or size > min(_HEADER_LIMIT, length - 8):
        raise InputError(f"{length} bytes do not hold a safetensors header", where=str(path), hint=_ADVICE)
    f.seek(8)
    try:  # the library keeps the last of two entries with one name
        json.loads(f.read(size), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"header is not JSON: {e}", where=str(path), hint=_ADVICE) from None


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise InputError(f"the header names {twice!r} twice", where=str(path), hint=_ADVICE)
    return found


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A finite sum proves it at a tenth of the cost of looking at every entry; one that is not may have overflowed.
    """
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by sorted name; contiguous copies, on the CPU. Equal tensors and metadata give equal bytes.

    Raises:
        InputError: A tensor holds NaN or infinity (its name is in the message).
        OSError: The disk is full, or whatever else the system says.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise InputError("holds NaN or infinity", where=name, hint="nothing was written")
    ready = {k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)}
    # Tensors that share memory are refused by the library; a clone keeps both.
    seen: dict[int, str] = {}
    for name, tensor in ready.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:
            ready[name] = tensor.clone()
        seen[pointer] = name
    try:
        save_file(ready, str(path), metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as e:
        number = re.search(r"os error (\d+)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
    _sort_metadata(path)


def joined_tensors(path: Path, homes: Mapping[str, Path], metadata: Mapping[str, str]) -> None:
    """Copy tensors from several safetensors files into one, as bytes: none of them is ever whole in memory.

    Args:
        path: The file to write.
        homes: Name -> the file that may hold it; names that a file lacks are left out.
        metadata: Of the new file.
    """
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for home in dict.fromkeys(homes.values()):
        with home.open("rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            entries = json.loads(f.read(size))
        places |= {n: (home, 8 + size, e) for n, e in entries.items() if homes.get(n) == home}
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    # Wide types first, as the library orders them, so that every tensor lies aligned.
    order = sorted(places, key=lambda n: (-int(re.sub(r"\D", "", places[n][2]["dtype"]) or 8), n))
    end = 0
    for name in order:
        start, stop = places[name][2]["data_offsets"]
        header[name] = {**places[name][2], "data_offsets": [end, end + stop - start]}
        end += stop - start
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            home, offset, entry = places[name]
            with home.open("rb") as f:
                f.seek(offset + entry["data_offsets"][0])
                _copy(f, out, entry["data_offsets"][1] - entry["data_offsets"][0])


def _copy(source: BinaryIO, out: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(length, 1 << 24))
        if not piece:
            raise InputError("ends too early", where=getattr(source, "name", ""), hint=_ADVICE)
        out.write(piece)
        length -= len(piece)


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in random order, and the same tensors should give the same bytes."""
    with path.open("r+b") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            f.seek(8)
            f.write(text.ljust(size))
