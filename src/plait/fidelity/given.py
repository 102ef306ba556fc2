"""What stands on the command line: a base first, or none, then adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.adapters.config import CONFIG, read_config
from plait.base import BaseModel
from plait.errors import InputError, UsageError


def split_base(
    given: Sequence[str], device: str = "auto", dtype: str = "float32"
) -> tuple[BaseModel | None, list[str]]:
    """The base, where the first argument is not itself an adapter, and the adapters.

    Raises:
        UsageError: No adapters.
        InputError: A path that is not there.
    """
    first, rest = (given[0], list(given[1:])) if given else ("", [])
    if not given or (not rest and not is_adapter(first)):
        raise UsageError("no adapters", hint="plait advise BASE ADAPTER ADAPTER")
    base, folders = (None, list(given)) if is_adapter(first) else (first, rest)
    for folder in folders:
        if not is_adapter(folder):
            found = place_of(folder)
            what = f"no {CONFIG} in it" if found.is_dir() else "no such adapter"
            raise InputError(
                what, where=str(found), hint="only the first argument may be a base; the others are adapters"
            )
    if base is not None:
        _require_base(base, folders)
    return (
        BaseModel(str(Path(base).expanduser()) if base.startswith("~") else base, None, dtype, device) if base else None
    ), folders


def _require_base(base: str, folders: Sequence[str]) -> None:
    """Refuse a misspelt folder: what is no folder is a base only if the adapters name it."""
    if Path(base).expanduser().is_dir():
        return
    named = sorted({read_config(place_of(f)).base for f in folders if place_of(f).is_dir()})
    if base.rpartition("/")[2] not in {n.rstrip("/").rpartition("/")[2] for n in named}:
        raise InputError(
            f"neither a folder nor the base that the adapters name ({', '.join(named)})",
            where=base,
            hint="the first argument is the base or an adapter folder",
        )


def is_adapter(argument: str) -> bool:
    """Whether an argument, ``PATH`` or ``NAME=PATH``, is a PEFT folder or a LoRA file."""
    place = place_of(argument)
    return (place / CONFIG).is_file() or (place.is_file() and place.suffix == ".safetensors")


def place_of(argument: str) -> Path:
    """The folder or file of ``PATH`` or ``NAME=PATH``."""
    name, equals, path = argument.partition("=")
    return Path(path) if equals and "/" not in name and not Path(argument).exists() else Path(argument)
