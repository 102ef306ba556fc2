"""What plait is measured beside: the same bytes read and written with as little as possible.

``python floors.py sum OUT FOLDER...`` adds adapters up with NumPy alone: headers, factors beside each other in the inputs' type,
SHA-256 of what is read and written, one flushed file. Nothing is checked and nothing read again.
``python floors.py header FILE`` reads a header, and does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def read(path: str) -> tuple[dict[str, Any], memoryview, str]:
    with Path(path).open("rb") as f:
        whole = memoryview(f.read())
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(bytes(whole[8 : 8 + size])), whole[8 + size :], hashlib.sha256(whole).hexdigest()


def add(out: str, folders: list[str]) -> None:
    import numpy as np

    inputs = [read(f"{folder}/adapter_model.safetensors") for folder in folders]
    names = sorted(k for k in inputs[0][0] if k != "__metadata__")
    header: dict[str, Any] = {}
    parts: list[list[Any]] = []
    end = 0
    for name in names:
        one: list[Any] = []
        for entries, data, _ in inputs:
            start, stop = entries[name]["data_offsets"]
            kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entries[name]["dtype"]]
            one.append(np.frombuffer(data[start:stop], kind).reshape(entries[name]["shape"]))
        parts.append(one)
        axis = 0 if "lora_A" in name else 1
        shape = list(one[0].shape)
        shape[axis] = sum(p.shape[axis] for p in one)
        length = sum(p.nbytes for p in one)
        header[name] = {
            "dtype": inputs[0][0][name]["dtype"],
            "shape": shape,
            "data_offsets": [end, end + length],
        }
        end += length
    head = json.dumps(header).encode()
    digest = hashlib.sha256()
    with Path(out).open("wb") as f:
        for piece in (struct.pack("<Q", len(head)), head):
            f.write(piece)
            digest.update(piece)
        for name, one in zip(names, parts, strict=True):
            joined = np.concatenate(one, axis=0 if "lora_A" in name else 1)
            if "lora_B" in name and joined.dtype == np.float32:
                joined *= np.float32(2.0)
            f.write(joined.data)
            digest.update(joined.data)
        f.flush()
        os.fsync(f.fileno())
    print(digest.hexdigest(), inputs[0][2])


def header(path: str) -> None:
    with Path(path).open("rb") as f:
        entries = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    print(len(entries))


if __name__ == "__main__":
    if sys.argv[1] == "sum":
        add(sys.argv[2], sys.argv[3:])
    else:
        header(sys.argv[2])
