"""Reading an adapter whatever it is: a folder of PEFT or mlx-lm, or a LoRA file of kohya or diffusers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from plait.adapters.config import CONFIG
from plait.adapters.hashing import Hashing
from plait.adapters.lora import Adapter
from plait.adapters.peft_format import begin_adapter
from plait.adapters.weights import WEIGHTS
from plait.disk.hub import adapter_place
from plait.errors import InputError
from plait.formats.keys import DIFFUSERS, ORIGINAL
from plait.formats.layouts import original_prefix
from plait.formats.mlx import read_mlx
from plait.formats.names import require_distinct
from plait.formats.recognised import format_of as format_of
from plait.formats.recognised import is_mlx
from plait.formats.single_file import begin_lora_file


def read_any(path: str | Path, *, name: str | None = None) -> Adapter:
    """Read a folder of PEFT or mlx-lm, or a kohya or diffusers file; raises as `read_adapter` and the others do.

    The weights' file of a PEFT folder stands for its folder.
    """
    with Hashing() as hashing:
        return begin_any(path, hashing, name=name)()


def begin_any(path: str | Path, hashing: Hashing, *, name: str | None = None) -> Callable[[], Adapter]:
    """As `read_any`, but for the hashes of a folder or file, which may be on their way yet (see `begin_adapter`)."""
    path = adapter_place(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if is_mlx(path):
        return partial(read_mlx, path, name=name)
    if path.is_dir() or not path.exists():
        return begin_adapter(path, hashing, name=name)
    if path.suffix == ".gguf":
        raise InputError(
            "a GGUF adapter, whose names only its base tells",
            where=str(path),
            hint=f"plait convert {shlex.quote(str(path))} --base DIR --out FOLDER, then merge that folder",
        )
    if path.suffix != ".safetensors":
        raise InputError(
            "a file, but no .safetensors", where=str(path), hint="a PEFT folder, or a LoRA file in safetensors"
        )
    return begin_lora_file(path, hashing, name=name)


def with_one_prefix(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Files whose modules a model's authors named, all under the prefix that the first of them has.

    ``diffusion_model.blocks.0``, ``model.diffusion_model.blocks.0`` and ``blocks.0`` are one module. Names are changed only
    where that gives an adapter modules of the first one; everything else stays.
    """
    first = next((a for a in adapters if format_of(a) == ORIGINAL), None)
    if first is None:
        return list(adapters)
    prefix = original_prefix(first.modules) or ""
    return [a if a is first else _under(prefix, a, first) for a in adapters]


def _under(prefix: str, adapter: Adapter, first: Adapter) -> Adapter:
    if format_of(adapter) not in (DIFFUSERS, ORIGINAL):
        return adapter
    own = original_prefix(adapter.modules) or ""
    named = {m: prefix + m.removeprefix(own) if m.startswith(own) else m for m in adapter.modules}
    if own == prefix or not first.modules.keys() & set(named.values()):
        return adapter
    require_distinct(named)
    modules = {new: adapter.modules[m] for m, new in named.items()}
    spelling = next(iter(adapter.source.get("layouts", {}).values()), "lora_A")
    layouts = {m.partition(".")[0]: spelling for m in modules}
    return replace(
        adapter,
        modules=dict(sorted(modules.items())),
        source={**adapter.source, "format": ORIGINAL, "layouts": layouts},
    )
