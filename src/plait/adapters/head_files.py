"""The heads of a PEFT folder, inside the weights' file or beside it, and what the backbone is called next to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.config import CLASSIFICATION_TYPES
from plait.adapters.hashing import Hashing
from plait.adapters.heads import HeadFacts, read_facts
from plait.adapters.lora import LoraFactors
from plait.adapters.naming import checked_in_file
from plait.adapters.weights import WEIGHTS, Begin, with_torch
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HEADS = "heads"
PREFIX = "backbone_prefix"  # in the metadata of a merge's weights


def prefix_of(
    factors: Mapping[str, LoraFactors], task_type: str | None, metadata: Mapping[str, str], folder: Path
) -> tuple[str, int]:
    """The backbone's attribute, and how much of every name it takes.

    A merge's file says it; with a task head beside it, the backbone is the one child that all LoRA modules live in.

    Raises:
        InputError: A module lies outside the backbone that the file names.
    """
    if prefix := metadata.get(PREFIX):
        if lost := [name for name in factors if not name.startswith(f"{prefix}.")]:
            raise InputError(
                f"module {lost[0]!r} is not inside {prefix!r}, as its file says", where=str(folder / WEIGHTS)
            )
        return prefix, len(prefix) + 1
    if task_type not in CLASSIFICATION_TYPES:
        return "", 0
    firsts = Counter(name.partition(".")[0] for name in factors)
    prefix = next(iter(firsts)) if len(firsts) == 1 and all("." in name for name in factors) else ""
    return prefix, len(prefix) + 1 if prefix else 0


def read_heads(
    folder: Path, begin: Begin | None = None
) -> tuple[dict[str, tuple[dict[str, Tensor], HeadFacts]], dict[str, str]]:
    """The heads in the folder's own files: task -> tensors and what is known of them; and the hash of each file."""
    found, digests = {}, {}
    for file in sorted((folder / HEADS).glob("*.safetensors")) if (folder / HEADS).is_dir() else []:
        with Hashing() as hashing:
            tensors, metadata, digest = (begin or with_torch())(file, hashing, finite=True)
            digests[f"{HEADS}/{file.name}"] = digest()
        name = checked_in_file(file.stem, "head", str(file), "give the file a task's name")
        found[name] = tensors, read_facts(metadata, tensors, str(file))
    return found, digests
