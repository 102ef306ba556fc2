"""A checkpoint of a choice as files: pieces of what was computed, and what adapters have answered, in JSON and one file of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.adapters.heads import HeadFacts
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.tensor_file import fill_tensors
from plait.adapters.tensors import read_tensors
from plait.border.records import from_json, to_json
from plait.disk.store import read_json
from plait.errors import InputError
from plait.fidelity.answers import Rows

_VALUES, _TENSORS = "state.json", "state.safetensors"
# Fields of an adapter that are tensors, or are written apart.
_APART = {"modules", "heads", "extras", "copies", "head_facts"}
_TUPLES = ("modules_to_save", "target_modules", "target_parameters")


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing that was computed.

    Args:
        values: What JSON can hold of it.
        tensors: Name -> tensor, any of which may hold infinity.
        adapters: Name -> adapter.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answered:
    """What one adapter or merge has answered to some texts of a task.

    Args:
        task: Name of the task.
        who: What a checkpoint calls it.
        scale: Its scale.
        places: Places of the texts among all of the task's.
        logits: (texts, classes).
    """

    task: str
    who: str
    scale: float
    places: tuple[int, ...]
    logits: Tensor

    @property
    def of_merge(self) -> bool:
        """Whether a merge answered, not an adapter or the base."""
        return self.who.startswith("merge ")

    @classmethod
    def of(cls, task: str, who: str, scale: float, rows: Rows, place: Mapping[tuple[str, ...], int]) -> Answered:
        """Take it from what is known, given every text's place."""
        return cls(task, who, scale, tuple(place[t] for t in rows), torch.from_numpy(np.stack(list(rows.values()))))


@dataclass(frozen=True, slots=True)
class State:
    """All that a checkpoint holds.

    Args:
        pieces: Name -> what was computed.
        answered: Of heads, what was answered.
        written: Task -> place of a prompt -> tokens that the task's adapter wrote after it.
    """

    pieces: Mapping[str, Piece] = field(default_factory=dict)
    answered: tuple[Answered, ...] = ()
    written: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in _tensors_of(self).values())


def write_state(folder: Path, state: State, identity: Mapping[str, Any] | None = None) -> None:
    """Write a state into an empty folder.

    Args:
        folder: The folder.
        state: The state.
        identity: What it belongs to.

    Raises:
        OSError: The disk is full, or whatever else the system says.
    """
    values = {
        "identity": dict(identity or {}),
        "pieces": {
            name: {"values": p.values, "tensors": list(p.tensors), "adapters": {a: _facts(x) for a, x in p.adapters.items()}}
            for name, p in state.pieces.items()
        },
        "answered": [[a.task, a.who, a.scale, a.places] for a in state.answered],
        "written": {task: list(rows.items()) for task, rows in state.written.items()},
    }  # fmt: skip
    (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")
    tensors = _tensors_of(state)

    def fill(put: Any) -> None:
        for name, tensor in tensors.items():
            put(name, tensor)

    fill_tensors(folder / _TENSORS, tensors, None, fill)  # not `write_tensors`, which refuses infinity


def read_identity(folder: Path) -> Mapping[str, Any]:
    """Read what a state belongs to; {} where it does not say."""
    try:
        identity = read_json(folder / _VALUES)["identity"]
    except (InputError, KeyError, TypeError):
        return {}
    return identity if isinstance(identity, dict) else {}


def read_state(folder: Path) -> State:
    """Read a state.

    Raises:
        InputError: The folder holds none that this version reads.
    """
    values = read_json(folder / _VALUES)
    # Copies, each of which lies in memory as what was computed here does: products may hang on that in their last bits.
    tensors = {name: t.clone() for name, t in read_tensors(folder / _TENSORS)[0].items()}
    try:
        pieces = {name: _piece(name, p, tensors) for name, p in values["pieces"].items()}
        answered = tuple(
            Answered(task, who, scale, tuple(places), tensors[f"answered.{i}"])
            for i, (task, who, scale, places) in enumerate(values["answered"])
        )
        written = {task: {place: tuple(ids) for place, ids in rows} for task, rows in values["written"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"not a state of a choice: {e!r}", where=str(folder)) from None
    return State(pieces, answered, written)


def _tensors_of(state: State) -> dict[str, Tensor]:
    """Every tensor under a name of its own."""
    found = {f"answered.{i}": a.logits for i, a in enumerate(state.answered)}
    for name, piece in state.pieces.items():
        found |= {f"{name}/{key}": t for key, t in piece.tensors.items()}
        found |= {f"{name}:{a}/{key}": t for a, x in piece.adapters.items() for key, t in _parts(x)}
    return {name: t.detach().cpu().contiguous() for name, t in found.items()}


def _piece(name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Piece:
    own = {key: tensors[f"{name}/{key}"] for key in values["tensors"]}
    adapters = {a: _adapter(facts, f"{name}:{a}/", tensors) for a, facts in values["adapters"].items()}
    return Piece(values["values"], own, adapters)


def settled(adapter: Adapter) -> Adapter:
    """Lay an adapter's tensors out row by row, as a checkpoint gives them back.

    The last bits of products hang on how their factors lie in memory: whoever goes on with an adapter that is kept does so with this.
    """

    def rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: t.contiguous() for key, t in tensors.items()}

    modules = {m: replace(f, A=f.A.contiguous(), B=f.B.contiguous()) for m, f in adapter.modules.items()}
    heads = {head: rows(tensors) for head, tensors in adapter.heads.items()}
    return replace(adapter, modules=modules, heads=heads, extras=rows(adapter.extras), copies=rows(adapter.copies))


# --- adapters ---------------------------------------------------------------------------------------------------------
# Not as a PEFT folder, which folds and renames: what goes on has to be to the bit what it was.


def _parts(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter, by a name of its own."""
    for module, f in adapter.modules.items():
        yield from ((f"A.{module}", f.A), (f"B.{module}", f.B))
    for head, tensors in adapter.heads.items():
        yield from ((f"head.{head}.{key}", t) for key, t in tensors.items())
    yield from ((f"extra.{key}", t) for key, t in adapter.extras.items())
    yield from ((f"copy.{key}", t) for key, t in adapter.copies.items())


def _facts(adapter: Adapter) -> Mapping[str, Any]:
    """All else of an adapter, and the names of its tensors in their order."""
    plain = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in _APART}
    return {
        **plain,
        "modules": [[m, f.scaling, f.kind] for m, f in adapter.modules.items()],
        "heads": {head: list(tensors) for head, tensors in adapter.heads.items()},
        "extras": list(adapter.extras),
        "copies": list(adapter.copies),
        "head_facts": {head: to_json(facts) for head, facts in adapter.head_facts.items()},
    }


def _adapter(facts: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Adapter:
    def named(kind: str, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: tensors[f"{prefix}{kind}.{key}"] for key in keys}

    plain = {k: v for k, v in facts.items() if k not in _APART}
    plain |= {k: tuple(plain[k]) for k in _TUPLES if isinstance(plain[k], list)}
    return Adapter(
        **plain,
        modules={
            m: LoraFactors(tensors[f"{prefix}A.{m}"], tensors[f"{prefix}B.{m}"], scaling, kind)
            for m, scaling, kind in facts["modules"]
        },
        heads={head: named(f"head.{head}", keys) for head, keys in facts["heads"].items()},
        extras=named("extra", facts["extras"]),
        copies=named("copy", facts["copies"]),
        head_facts={head: from_json(HeadFacts, values) for head, values in facts["head_facts"].items()},
    )
