"""Reading an adapter whatever it is: a PEFT folder, or a LoRA file of kohya or diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from plait.adapters.config import CONFIG
from plait.adapters.hashing import Hashing
from plait.adapters.lora import Adapter
from plait.adapters.peft_format import begin_adapter
from plait.adapters.weights import WEIGHTS
from plait.errors import InputError
from plait.formats.keys import PEFT
from plait.formats.single_file import read_lora_file
from plait.hub import adapter_place


def read_any(path: str | Path, *, name: str | None = None) -> Adapter:
    """Read a PEFT folder, or a kohya or diffusers file; raises as `read_adapter` and `read_lora_file`.

    The weights' file of a PEFT folder stands for its folder.
    """
    with Hashing() as hashing:
        return begin_any(path, hashing, name=name)()


def begin_any(path: str | Path, hashing: Hashing, *, name: str | None = None) -> Callable[[], Adapter]:
    """As `read_any`, but for the hashes of a folder, which may be on their way yet (see `begin_adapter`)."""
    path = adapter_place(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir() or not path.exists():
        return begin_adapter(path, hashing, name=name)
    if path.suffix != ".safetensors":
        raise InputError(
            "a file, but no .safetensors", where=str(path), hint="a PEFT folder, or a LoRA file in safetensors"
        )
    return partial(read_lora_file, path, name=name)


def format_of(adapter: Adapter) -> str:
    """The format an adapter was read from: "peft", "kohya" or "diffusers"."""
    return str(adapter.source.get("format", PEFT))
