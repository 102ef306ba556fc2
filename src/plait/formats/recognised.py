"""What a path holds, told by names, configs and headers alone: mlx-lm's folder, a pipeline's components, plait's own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.config import CONFIG, LARGEST_CONFIG
from plait.adapters.lora import Adapter
from plait.border.checked import LARGEST_MANIFEST, Record, parsed_json
from plait.disk.files import read_json
from plait.formats.keys import DIFFUSERS, KOHYA, ORIGINAL, PEFT
from plait.formats.names import COMPONENTS

MLX_FILE = "adapters.safetensors"
RECORD = "plait"  # metadata key of the record that a folder keeps in plait.json


def is_mlx(path: Path) -> bool:
    """Whether a folder, or the file in it, is an adapter of mlx-lm: by its weights' name and a config that is not PEFT's."""
    folder = path.parent if path.name == MLX_FILE else path
    if not (folder / MLX_FILE).is_file() or not (folder / CONFIG).is_file():
        return False
    raw = read_json(folder / CONFIG, limit=LARGEST_CONFIG)
    return isinstance(raw, dict) and "peft_type" not in raw and bool({"fine_tune_type", "lora_parameters"} & raw.keys())


def component_folders(source: Path) -> dict[str, Path]:
    """Component -> its PEFT folder, where a folder holds such folders, one of them named as a pipeline's, and is none itself."""
    if not source.is_dir() or (source / CONFIG).exists():
        return {}
    found = {p.name: p for p in sorted(source.iterdir()) if (p / CONFIG).is_file()}
    return found if found.keys() & {*COMPONENTS.values()} else {}


def of_images(adapters: Sequence[Adapter]) -> bool:
    """Whether one of them is a LoRA file of an image model, by its format; folders of PEFT and of mlx-lm are of language models."""
    return any(format_of(a) in (KOHYA, DIFFUSERS, ORIGINAL) for a in adapters)


def format_of(adapter: Adapter) -> str:
    """The format an adapter was read from, a name in `keys.FORMATS`."""
    return str(adapter.source.get("format", PEFT))


def file_record(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The record plait left in a file's metadata, or None."""
    if RECORD not in metadata:
        return None
    raw = parsed_json(metadata[RECORD], str(path), f"its metadata's {RECORD!r}", LARGEST_MANIFEST)
    record = Record.of(raw, str(path), inside=f"its metadata's {RECORD!r}")
    parts = {key: dict(record.record(key, optional=True).values) for key in ("options", "inputs", "result")}
    record.record("result", optional=True).texts("tasks", ())
    return {**record.values, **parts}  # null stands for nothing
