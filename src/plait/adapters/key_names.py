"""PEFT's adapter names inside tensor names: ``lora_A.default.weight`` is ``lora_A.weight`` of the adapter `default`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from plait.border.counts import plural
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# PEFT's save_pretrained takes these names out; state dicts that were saved by hand keep them.
_NAMED = (
    re.compile(r"(?P<before>.*\.lora_(?:A|B|down|up))\.(?P<name>(?!weight$|bias$)[^.]+)(?P<after>\.(?:weight|bias))"),
    re.compile(r"(?P<before>.*\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<after>)"),
    re.compile(r"(?P<before>.*)\.modules_to_save\.(?P<name>[^.]+)(?P<after>\..+)"),
)


def without_adapter_name(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under the names that PEFT saves them by.

    Raises:
        InputError: Several adapters in one file, or one tensor with and without an adapter's name.
    """
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        hit = next((m for pattern in _NAMED if (m := pattern.fullmatch(key))), None)
        plain = hit["before"] + hit["after"] if hit else key
        if hit:
            names.setdefault(hit["name"], key)
        if plain in found:
            if len(names) < 2:
                raise InputError(f"{key!r} is there with and without the adapter's name", where=where)
            continue
        found[plain] = tensor
    if len(names) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        raise InputError(
            f"holds the adapters {one!r} and {other!r} at once ({first!r}, {second!r})",
            where=where,
            hint="save each alone: model.save_pretrained(DIR, selected_adapters=[NAME])",
        )
    return found


def kinds_of_names(names: Iterable[str]) -> str:
    """What a file without LoRA factors holds, in words: how many tensors, and the first names."""
    known = list(names)
    shown = ", ".join(repr(n) for n in known[:3])
    return (
        f"{plural(len(known), 'tensor')}, none of them called lora_A, lora_B, lora_down or lora_up: {shown}"
        if known
        else "nothing"
    )
