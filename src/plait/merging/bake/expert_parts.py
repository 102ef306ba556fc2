"""Where an expert's update goes in a base's files: into a slice of a fused weight, or into tensors of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plait.adapters.experts import member_of, parameters_of
from plait.adapters.lora import Adapter
from plait.border.module_names import named_by
from plait.errors import InputError
from plait.merging.dense import DenseDelta, row_blocks
from plait.model.stored import StoredTensor
from plait.model.stored_names import all_named

if TYPE_CHECKING:
    from plait.model.layout import StoredParameter


@dataclass(frozen=True, slots=True)
class Part:
    """A stored matrix that takes an expert's update, or some of its rows.

    Args:
        tensor: Name on disk.
        stored: The matrix, where it lies.
        delta: What is added, (out, in).
        transposed: Whether it is stored (in, out).
    """

    tensor: str
    stored: StoredTensor
    delta: DenseDelta
    transposed: bool


def layout_for(base: Path, adapter: Adapter, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredParameter]:
    """How the base's files keep the model's parameters, for adapters that name parameters, or modules that the files call otherwise."""
    if not parameters_of(adapter) and all_named(adapter, tensors):
        return {}
    from plait.model.layout import checkpoint_layout, layout_of_names

    return checkpoint_layout(base, list(tensors)) if parameters_of(adapter) else layout_of_names(base, tensors)


def known_names(tensors: Mapping[str, StoredTensor], layout: Mapping[str, StoredParameter]) -> dict[str, StoredTensor]:
    """The base's tensors, those that the model calls otherwise under that name as well."""
    if not layout:
        return dict(tensors)
    from plait.model.layout import known_names as both

    return both(tensors, layout)


def expert_parts(
    module: str,
    prefix: str,
    delta: DenseDelta,
    layout: Mapping[str, StoredParameter],
    tensors: Mapping[str, StoredTensor],
) -> list[Part]:
    """The stored matrices of one expert, with the rows of its update that each takes.

    Args:
        module: An expert, such as ``layers.0.mlp.experts.down_proj[3]``.
        prefix: Of its adapter's names.
        delta: Its update.
        layout: Of the base, from `plait.model.layout.checkpoint_layout`.
        tensors: Of the base, by name.

    Raises:
        InputError: The base has no such weight, one of another shape, or keeps it in a way that is not known.
    """
    member = member_of(module)
    if member is None:
        raise ValueError(f"{module} is no expert")
    parameter, number = member
    name = _parameter_of(parameter, prefix, layout)
    stored = layout[name]
    if stored.unknown:
        raise InputError(
            f"the base's files keep {name!r} in a way that is not known here ({stored.unknown})",
            where=module,
            hint="load and save the base with transformers' save_original_format=False: its experts are fused then",
        )
    flipped = stored.is_transposed
    found, start = [], 0
    for part in stored.parts:
        if number >= (len(part) if stored.by_expert else stored.shape[0]):
            raise InputError(f"the base has no expert {number} of {name!r}", where=module)
        tensor = part[number] if stored.by_expert else part[0]
        matrix = tensors[tensor] if stored.by_expert else _slice(tensors[tensor], number)
        transposed = flipped
        if not stored.by_expert and tuple(tensors[tensor].shape) != stored.shape and len(stored.parts) == 1:
            transposed = not flipped  # transformers turns it while it loads
        rows = matrix.shape[1] if transposed else matrix.shape[0]
        found.append(Part(tensor, matrix, _rows(delta, start, start + rows), transposed))
        start += rows
    _require_shapes(found, start, delta, module, flipped)
    return found


def _require_shapes(parts: list[Part], rows: int, delta: DenseDelta, module: str, flipped: bool) -> None:
    shapes = [p.stored.shape for p in parts]
    wide = all(
        len(s) == 2 and (s[0] if p.transposed else s[1]) == delta.shape[1] for s, p in zip(shapes, parts, strict=True)
    )
    if not wide or rows != delta.shape[0] or (flipped and len(parts) > 1):
        raise InputError(
            f"has an update {delta.shape} and the base {' and '.join(map(str, shapes))}",
            where=f"{module} ({parts[0].tensor})",
        )


def _parameter_of(parameter: str, prefix: str, layout: Mapping[str, StoredParameter]) -> str:
    for name in (parameter, f"{prefix}.{parameter}"):
        if name in layout:
            return name
    endings = [n for n in layout if named_by(n, parameter) or named_by(parameter, n)]
    if len(endings) == 1:
        return endings[0]
    raise InputError(
        f"the base has no parameter {parameter!r}",
        where=parameter,
        hint="a base that transformers itself can load, whose experts are fused in the model"
        if not layout
        else "not the base these adapters were trained on?",
    )


def _slice(fused: StoredTensor, number: int) -> StoredTensor:
    """One expert's matrix inside a tensor of all."""
    size = math.prod(fused.shape[1:]) * fused.torch_dtype.itemsize
    return replace(fused, shape=fused.shape[1:], start=fused.start + number * size)


def _rows(delta: DenseDelta, first: int, last: int) -> DenseDelta:
    """Rows [first, last) of an update, from the blocks in which it is made."""
    if (first, last) == (0, delta.shape[0]):
        return delta

    def rows(start: int, stop: int) -> Tensor:
        a, b = first + start, first + stop
        blocks = [(i, j) for i, j in row_blocks(delta.shape) if i < b and j > a]
        return torch.cat([delta.rows(i, j)[max(a - i, 0) : b - i] for i, j in blocks])

    return DenseDelta((last - first, delta.shape[1]), rows)
