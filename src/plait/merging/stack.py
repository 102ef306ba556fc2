"""Adapters trained one on top of another: recognised by what their folders record, composed in that order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from plait.adapters.config import CLASSIFICATION_TYPES
from plait.adapters.lineage import base_adapter, is_baked
from plait.adapters.lora import Adapter
from plait.disk.store import MANIFEST, read_manifest
from plait.errors import InputError
from plait.merging.record import Layer
from plait.model.records import EARLIER, SHA256

# Two adapters from one random A reach about 0.99 after training; from two, chance alone gives a few hundredths.
_CONTINUED = 0.9


def in_order(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters from the one on the plain base to the one on top of all others.

    Raises:
        InputError: No record that one was trained on another, one that lies on an adapter that is not given, or two on
            the same.
    """
    below = {a.name: _below(a, adapters) for a in adapters}
    roots = [a for a in adapters if below[a.name] is None]
    if len(roots) != 1:
        _refuse_continued(roots)
        names = ", ".join(repr(a.name) for a in roots)
        raise InputError(
            f"nothing recorded says that one of {names} was trained on top of the other: both name base {roots[0].base!r}"
            if roots
            else "each of these adapters was trained on top of another",
            where=", ".join(a.name for a in adapters),
            hint="if you know that it was, --method cat adds their updates",
        )
    ordered = roots
    while len(ordered) < len(adapters):
        above = [a for a in adapters if below[a.name] == ordered[-1].name]
        if len(above) != 1:
            names = ", ".join(repr(a.name) for a in above) or "none of the others"
            raise InputError(f"{names} lie on {ordered[-1].name!r}; a stack has one on each", where=ordered[-1].name)
        ordered.append(above[0])
    return ordered


def _refuse_continued(adapters: Sequence[Adapter]) -> None:
    """An adapter that went on training another's factors holds its update already: adding both would count it twice."""
    for i, one in enumerate(adapters):
        for other in adapters[i + 1 :]:
            if (alike := likeness(one, other)) > _CONTINUED:
                raise InputError(
                    f"{one.name!r} and {other.name!r} are one adapter at two stages of training (their A agree to {alike:.4f}): "
                    "the later one holds the update of the earlier",
                    where=other.name,
                    hint="use the later one alone",
                )


def likeness(one: Adapter, other: Adapter) -> float:
    """The cosine between the A's of two adapters over all modules, which is near 1 only where one continued the other.

    A's that start at random are orthogonal but for chance, and training turns them little.
    """
    shared = [m for m, f in one.modules.items() if m in other.modules and other.modules[m].A.shape == f.A.shape]
    pairs = [(one.modules[m].A.double().flatten(), other.modules[m].A.double().flatten()) for m in shared]
    norms = sum(float(a.norm() * b.norm()) for a, b in pairs)
    changed = any(not torch.equal(one.modules[m].B, other.modules[m].B) for m in shared)
    return sum(float(a @ b) for a, b in pairs) / norms if norms and changed else 0.0


def _below(adapter: Adapter, others: Sequence[Adapter]) -> str | None:
    """Name of the given adapter that this one was trained on."""
    place = base_adapter(Path(str(adapter.source.get("path", ""))))
    if place is None:
        return None
    for other in others:
        if Path(str(other.source.get("path", ""))).resolve() == place.resolve() or _baked_from(place, other):
            return other.name
    raise InputError(
        f"{adapter.name!r} was trained on top of {str(place)!r}, which is not among the adapters given",
        where=adapter.name,
        hint="give that one too",
    )


def _baked_from(place: Path, other: Adapter) -> bool:
    """Whether a baked model holds exactly this adapter, by the hashes both record."""
    if not is_baked(place):
        return False
    baked = read_manifest(place) or {}
    inputs = {k: v for k, v in baked.get("inputs", {}).items() if k not in ("adapter", "base")}
    options = baked.get("options", {})
    plain = options.get("weights", [1.0]) == [1.0] and options.get("scale", 1.0) == 1.0 and not options.get("rank")
    linear = options.get("method", "cat") in ("cat", "linear", "task_arithmetic") and not options.get("calibrate")
    if list(inputs.values()) == [other.source.get("sha256")] and plain and linear:
        return True
    folder = Path(str(other.source.get("path", "")))
    merged = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if not inputs and baked.get("inputs", {}).get("adapter") == other.source.get("sha256"):
        return True
    return bool(merged and inputs and (merged.get("options"), merged.get("inputs")) == (options, inputs))


def composed(ordered: Sequence[Adapter]) -> list[Adapter]:
    """The same updates as adapters of the lowest one's base; only the topmost keeps its heads, which fit no other model.

    On linear modules and embeddings updates add up: (W + D_1) + D_2. So the stack is their concatenation, exactly.
    """
    root, top = ordered[0], ordered[-1]
    found = []
    for adapter in ordered:
        heads = adapter.heads if adapter is top else {}
        source = {**adapter.source, "trained_on": adapter.base}
        source.pop(SHA256, None)
        source.pop(EARLIER, None)
        kind = top.task_type if root.task_type in CLASSIFICATION_TYPES else adapter.task_type
        found.append(
            replace(adapter, base=root.base, revision=root.revision, heads=heads, task_type=kind, source=source)
        )
    return found


def layers_of(ordered: Sequence[Adapter]) -> tuple[Layer, ...]:
    """Record the order, from the base upwards, and what each was trained on."""
    return tuple(Layer(a.name, a.base) for a in ordered)
