"""A base model's folder as files: where each tensor lies, and changing one in a copy without loading the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapters.config import CONFIG
from plait.adapters.file_bytes import read_layout
from plait.adapters.memory import bytes_of
from plait.adapters.tensor_file import begin_writing_out
from plait.disk.store import read_json
from plait.errors import InputError
from plait.model.files import weight_files

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Args:
        file: Path of its shard.
        shape: Its shape as stored.
        dtype: safetensors' name, such as "BF16".
        start: Offset of its first byte in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype.

        Raises:
            InputError: Not a floating one: a quantised weight.
        """
        if self.dtype not in _DTYPES:
            raise InputError(f"stored as {self.dtype}: a quantised weight", where=str(self.file), hint=QUANTISED)
        return _DTYPES[self.dtype]

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        row = math.prod(self.shape[1:]) * self.torch_dtype.itemsize
        return self.start + start * row, (stop - start) * row

    @property
    def span(self) -> tuple[int, int]:
        """Where its bytes begin and end in the file."""
        offset, size = self._span(0, self.shape[0])
        return offset, offset + size

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop); raises as `read_into`."""
        rows = torch.empty(stop - start, *self.shape[1:], dtype=self.torch_dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: Tensor) -> None:
        """Fill a contiguous tensor of this type with rows from `start`.

        Raises:
            InputError: The file ends before them.
        """
        offset, _ = self._span(start, start + len(rows))
        rest = bytes_of(rows)
        with self.file.open("rb", buffering=0) as f:
            f.seek(offset)
            while rest.nbytes:
                if not (count := f.readinto(rest)):
                    raise InputError("ends too early", where=str(self.file), hint="copy it again")
                rest = rest[count:]

    def write(self, start: int, rows: Tensor) -> None:
        """Overwrite rows from `start`; the disk begins with them."""
        offset, size = self._span(start, start + len(rows))
        rest = bytes_of(rows.to(self.torch_dtype).contiguous())
        with self.file.open("r+b", buffering=0) as f:
            f.seek(offset)
            while rest.nbytes:
                rest = rest[f.write(rest) or 0 :]
            begin_writing_out(f.fileno(), offset, offset + size)


QUANTISED = (
    "bake into the full-precision base of the same weights, or serve the merged adapter on the quantised base as it is; "
    "quantise after baking"
)


def base_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of a model folder, by name.

    Raises:
        InputError: No safetensors weights, a damaged header, or a shard that is missing.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in weight_files(folder):
        tensors |= tensors_in(shard)
    return tensors


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file, by name.

    Raises:
        InputError: Not a whole safetensors file; what it is instead is said.
    """
    _, entries, start = read_layout(path)
    return {
        n: StoredTensor(path, tuple(v["shape"]), v["dtype"], start + v["data_offsets"][0]) for n, v in entries.items()
    }


def require_unquantised(folder: Path) -> Mapping[str, Any]:
    """Read the config.json of a folder whose weights are plain numbers.

    Raises:
        InputError: Missing, or of a quantised model, with the alternatives.
    """
    if (folder / CONFIG).is_file() and not (folder / "config.json").exists():
        raise InputError("an adapter, and a whole model is asked for", where=str(folder))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(folder / "config.json"))
    quantised = config.get("quantization_config")
    if isinstance(quantised, Mapping):
        kind = quantised.get("quant_method", "quantised")
        raise InputError(f"a {kind} base: rounding would swallow the update", where=str(folder), hint=QUANTISED)
    return config
