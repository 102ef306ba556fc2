"""Writing safetensors: a file whose layout is known first, filled tensor by tensor while the disk is at work already."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from plait.adapters.arrays import Array, all_finite
from plait.adapters.hashing import WrittenFile
from plait.adapters.header import ITEMSIZES, TORCH_NAMES
from plait.adapters.memory import bytes_of
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {f"torch.{name}": code for code, name in TORCH_NAMES.items()}
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin to write these pages out and do not wait
# Bytes after which the disk is told to begin: telling it for every tensor of a quarter of a megabyte took 6 of 16 ms.
_STRIDE = 1 << 22

Put = Callable[[str, "Tensor | Array"], None]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Array],
    metadata: Mapping[str, str] | None = None,
    written: WrittenFile | None = None,
) -> None:
    """Write tensors as the library lays them out: wide types first, then by name. Equal tensors and metadata, equal bytes.

    The library itself writes metadata in random order and files that only their owner may read. `written`: see `fill_tensors`.

    Raises:
        InputError: A tensor holds NaN or infinity (its name is in the message).
        OSError: The disk is full, or whatever else the system says.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError("holds NaN or infinity", where=name, hint="nothing was written")

    def fill(put: Put) -> None:
        for name, tensor in tensors.items():
            put(name, tensor)

    fill_tensors(path, tensors, metadata, fill, written)


def fill_tensors(
    path: Path,
    shapes: Mapping[str, Tensor] | Mapping[str, Tensor | Array],
    metadata: Mapping[str, str] | None,
    fill: Callable[[Put], None],
    written: WrittenFile | None = None,
    late: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write the same bytes as `write_tensors`, each tensor when it is ready and at its place.

    Args:
        path: The file to write.
        shapes: Name -> a tensor of the right shape and dtype, which may be on the meta device.
        metadata: Of the file.
        fill: Called with a function that takes (name, tensor), once for every name, in any order, from any thread.
            Whether the numbers are finite is for the caller to know.
        written: Is told what the file holds already, where it is to be hashed meanwhile.
        late: Gives the metadata once all tensors are in the file, where some of it is not known before; those above then only
            keep the place, and a few spaces may be left behind the header.

    Raises:
        ValueError: A tensor of another shape or dtype than was said, one twice, or one left out; later metadata longer than
            their place: the caller's mistake.
        OSError: The disk is full, or whatever else the system says.
    """
    header: dict[str, Any] = {"__metadata__": _texts(metadata or {})}
    end = 0
    for name in sorted(shapes, key=lambda k: (-shapes[k].itemsize, k)):
        start, end = end, end + shapes[name].nbytes
        header[name] = {
            "dtype": _NAMES[str(shapes[name].dtype)],
            "shape": list(shapes[name].shape),
            "data_offsets": [start, end],
        }
    head = header_bytes(header)
    missing = set(shapes)
    with path.open("wb", buffering=0) as f:
        set_aside(f.fileno(), len(head) + end)
        tell = written.wrote if written else _nobody
        tell(0, _write_at(f.fileno(), memoryview(head), 0))

        def put(name: str, tensor: Tensor | Array) -> None:
            if tensor.shape != shapes[name].shape or tensor.dtype != shapes[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not what its header says")
            missing.remove(name)
            if tensor.numel():
                data = bytes_of(tensor if isinstance(tensor, Array) else tensor.detach().cpu().contiguous())
                place = len(head) + header[name]["data_offsets"][0]
                tell(place, _write_at(f.fileno(), data, place))

        fill(put)
        if missing:
            raise ValueError(f"{min(missing)} was never written")
        if late is not None:
            last = header_bytes({**header, "__metadata__": _texts(late())}, len(head))
            if len(last) != len(head):
                raise ValueError(f"{len(last) - len(head)} bytes more of metadata than there is a place for")
            _write_at(f.fileno(), memoryview(last), 0)


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted({"format": "pt", **metadata}.items()))


def is_finite(tensor: Tensor | Array) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if isinstance(tensor, Array):
        return all_finite(tensor)
    from plait.adapters.tensors import all_finite as all_of_tensor

    return all_of_tensor(tensor)


def _nobody(start: int, stop: int) -> None:
    """Nobody hashes what is written."""


def _write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all bytes at a place, and return where they end; at every stride the disk begins with what it has got so far."""
    start = offset
    while data.nbytes:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    begin_writing_out(fd, start, offset)
    return offset


def _of_linux(name: str, *arguments: Any) -> Callable[..., int] | None:
    """A call of Linux that Python has no name for; None elsewhere."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = list(arguments)  # type: ignore[attr-defined]
    return found


# Elsewhere a file grows as it is written, and the disk begins when it is flushed. Python's own posix_fallocate writes zeros where a disk
# cannot set a place aside.
_fallocate = _of_linux("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _of_linux("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def set_aside(fd: int, size: int) -> None:
    """Have the disk find the place of a whole file at once: page by page that took as long as copying the bytes.

    A hint: where it is not heeded, writing does it, and says what is wrong.
    """
    if _fallocate is not None and size > _STRIDE:
        _fallocate(fd, 0, 0, size)


def begin_writing_out(fd: int, start: int, stop: int) -> None:
    """Have the disk begin with what a file has got so far, once bytes [start, stop) end in another stride than they began.

    A hint: whether it is heeded or not, the file is flushed before it takes its place (`store.staged_folder`).
    """
    if _sync_file_range is not None and start // _STRIDE != stop // _STRIDE:
        # 0 bytes: up to the end, of which only what was not begun yet costs anything.
        _sync_file_range(fd, 0, 0, _WRITE)


def header_bytes(header: Mapping[str, Any], size: int = 0) -> bytes:
    """The header as it lies in the file: its length, its text, spaces up to a multiple of eight, or to `size` in all."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(max(-(-len(text) // 8) * 8, size - 8))
    return struct.pack("<Q", len(text)) + text


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
    order = sorted(places, key=lambda n: (-ITEMSIZES.get(places[n][2]["dtype"], 1), n))
    end = 0
    for name in order:
        start, stop = places[name][2]["data_offsets"]
        header[name] = {**places[name][2], "data_offsets": [end, end + stop - start]}
        end += stop - start
    with path.open("wb") as out:
        out.write(header_bytes(header))
        for name in order:
            home, offset, entry = places[name]
            with home.open("rb") as f:
                f.seek(offset + entry["data_offsets"][0])
                _copy(f, out, entry["data_offsets"][1] - entry["data_offsets"][0])


def _copy(source: BinaryIO, out: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(length, 1 << 24))
        if not piece:
            raise InputError("ends too early", where=getattr(source, "name", ""), hint="copy it again")
        out.write(piece)
        length -= len(piece)
