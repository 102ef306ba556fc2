"""What stands on the command line: a base first, or none, then adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.adapters.config import CONFIG, read_config
from plait.adapters.lineage import same_name
from plait.adapters.lora import Adapter
from plait.adapters.naming import split_name
from plait.adapters.places import inside
from plait.disk.hub import adapter_place, cached_folder, split_revision
from plait.errors import InputError, UsageError
from plait.model.base import BaseModel


def split_base(
    arguments: Sequence[str], device: str = "auto", four_bits: str | None = None
) -> tuple[BaseModel | None, list[str]]:
    """Split arguments into the base, where the first is not itself an adapter, and the adapters.

    Args:
        arguments: Folders, files or hub names; the base first, or none.
        device: Device of the base.
        four_bits: Kind of four bits that its layers go through, or None.

    Returns:
        The base, or None; and the adapters as they were typed.

    Raises:
        UsageError: No adapters.
        InputError: A path that is not there.
    """
    first, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if not arguments or (not rest and not is_adapter(first)):
        what = "no adapters" if not arguments or Path(first).is_dir() else f"no adapters: {first} is none"
        raise UsageError(what, hint=inside(Path(first)) or "first the base, then adapters: BASE ADAPTER ADAPTER")
    base, folders = (None, list(arguments)) if is_adapter(first) else (first, rest)
    for folder in folders:
        if not is_adapter(folder):
            place = place_of(folder)
            what = f"no {CONFIG} in it" if place.is_dir() else "no such adapter"
            hint = inside(place) or "only the first argument may be a base; the others are adapters"
            raise InputError(what, where=str(place), hint=hint)
    if base is not None:
        _require_base(base, folders)
    return (_base_model(base, device, four_bits) if base else None), folders


def _base_model(base: str, device: str, four_bits: str | None) -> BaseModel | None:
    name, revision = split_revision(str(Path(base).expanduser()) if base.startswith("~") else base)
    return BaseModel(name, revision, device=device, four_bits=four_bits) if name else None


def _require_base(base: str, folders: Sequence[str]) -> None:
    """Refuse a misspelt folder: what is no folder is a base only if the adapters name it."""
    if (folder := Path(base).expanduser()).is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"neither an adapter (no {CONFIG}) nor a base (no config.json)", where=base, hint=inside(folder)
            )
        return
    name, revision = split_revision(base)
    named = sorted({read_config(place_of(f)).base for f in folders if place_of(f).is_dir()})
    if not any(same_name(name, n) for n in named) and cached_folder(name, revision) is None:
        raise InputError(
            f"neither a folder nor the base that the adapters name ({', '.join(named)})",
            where=base,
            hint="the first argument is the base or an adapter folder",
        )


def recorded_base(adapters: Sequence[Adapter], device: str = "auto", four_bits: str | None = None) -> BaseModel | None:
    """Find the base that all adapters name, where it is a folder on this machine; nothing is downloaded on a record's word."""
    names = {a.base for a in adapters}
    folder = Path(next(iter(names))).expanduser() if len(names) == 1 else Path()
    found = (folder / "config.json").is_file()
    return BaseModel(str(folder), device=device, four_bits=four_bits) if found else None


def is_adapter(argument: str) -> bool:
    """Whether an argument, ``PATH`` or ``NAME=PATH``, is a PEFT folder or a LoRA file."""
    try:
        place = place_of(argument)
    except InputError:  # on the hub, if anywhere, and not as an adapter
        return False
    return (place / CONFIG).is_file() or (place.is_file() and place.suffix == ".safetensors")


def place_of(argument: str) -> Path:
    """Find the folder or file of ``PATH`` or ``NAME=PATH``; of ``user/name``, its folder in the hub's cache."""
    return adapter_place(split_name(argument)[1])
