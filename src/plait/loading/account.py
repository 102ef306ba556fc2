"""What an account of loading says: a line per tensor, notes, and what would be loaded otherwise than was meant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Effect = Literal["loaded", "replaces", "overwrites", "dropped", "refused", "beside"]
# loaded: becomes a parameter of the adapter, or of the model where a whole model is loaded
# replaces: stands in for a module of the base while the adapter is active (PEFT's modules_to_save)
# overwrites: is written into the base's own weights, which stay changed when the adapter is switched off
# dropped: is read and thrown away
# refused: makes the loader raise
# beside: lies in the folder and is not opened by this loader


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor goes.

    Args:
        tensor: Name in the file; of a file that the loader does not open, ``file:name``.
        parameter: Name of the parameter it becomes in the loaded model; "" where it becomes none.
        kind: What it is: "lora_A", "lora_B", "head", "whole weight", "copy of a base weight", "weight" and so on.
        effect: What the loader does with it.
    """

    tensor: str
    parameter: str
    kind: str
    effect: Effect


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that a loader loads otherwise than was meant.

    Args:
        tensor: The tensor or the key of the config at fault.
        what: What the loader does with it.
        hint: The next step.
        raises: Whether the loader says so by an error; False where it goes on in silence or with a warning.
    """

    tensor: str
    what: str
    hint: str
    raises: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """What one loader makes of one adapter, file or model.

    Args:
        loader: A name in `LOADERS`.
        version: The versions whose rules these are.
        inside: The folder's subfolder or file that this is about; "" for the folder itself.
        placements: One for every tensor, in the order of the file.
        notes: What to know: flags to give, what depends on the base.
        faults: What would be loaded otherwise than was meant; empty where all is well.
        own: Whether the format is this loader's own, so that its faults are the folder's.
    """

    loader: str
    version: str
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    inside: str = ""
    own: bool = False

    def count(self, effect: Effect) -> int:
        """How many tensors meet this effect."""
        return sum(p.effect == effect for p in self.placements)

    def named(self, loader: str, notes: tuple[str, ...] = (), faults: tuple[Fault, ...] = ()) -> Account:
        """The same for a loader that loads through this one, with what it adds; `own` is False then."""
        return replace(self, loader=loader, notes=self.notes + notes, faults=self.faults + faults, own=False)
