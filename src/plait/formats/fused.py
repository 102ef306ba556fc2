"""Transformers whose original layout fuses projections that diffusers keeps apart: updates taken apart and put together.

A fused projection stacks its parts' outputs. Its update B A splits by B's rows: every part has A, and its own rows of B. The
other way, parts with one A stack again; parts with different ones become a block-diagonal B over all their A, one under
another: exact too, with the ranks added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.adapters.lora import LoraFactors
from plait.errors import InputError

_ORIGINAL, _DIFFUSERS = "lora_unet_", "transformer."


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of repeated block.

    Args:
        original: Its name in kohya's files, up to its number.
        diffusers: The same in diffusers, after the component.
        layers: Layer as kohya's files have it -> its parts as diffusers has them; several where it is fused.
    """

    original: str
    diffusers: str
    layers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A transformer's original layout beside diffusers'.

    Args:
        name: What options call it.
        blocks: Its repeated blocks.
        outside: What lies outside of them, kohya's name -> diffusers'.
        swapped: Layers (diffusers' last words) that predict a shift and a scale, in the other order in diffusers: always,
            or where the output is twice the input (of a block that elsewhere predicts six).
        third: Which text encoder of diffusers' pipeline kohya's files call the third (``lora_te3_``, T5's).
        mlp: Outputs of an MLP's first layer over its inputs, for fused layers whose MLP is not adapted.
    """

    name: str
    blocks: tuple[Block, ...]
    outside: Mapping[str, str]
    swapped: tuple[str, ...]
    third: str = "text_encoder_3"
    mlp: int = 4

    def encoder_out(self, name: str) -> str:
        """A text encoder's module, numbered as kohya's files do -> as the pipeline does."""
        return name.replace("text_encoder_3.", f"{self.third}.", 1) if name.startswith("text_encoder_3.") else name

    def encoder_in(self, name: str) -> str:
        """The other way round."""
        return name.replace(f"{self.third}.", "text_encoder_3.", 1) if name.startswith(f"{self.third}.") else name


def is_original(module: str, layout: Layout) -> bool:
    """Whether a kohya name is of this layout's blocks."""
    return any(_numbered(module, _ORIGINAL + b.original + "_", "_") for b in layout.blocks)


def taken_apart(modules: Mapping[str, LoraFactors], layout: Layout) -> dict[str, LoraFactors]:
    """The modules of a kohya file with this layout's as diffusers has them; others (text encoders) keep their names.

    Raises:
        InputError: A layer that the model has not, or one whose parts do not fill it.
    """
    found: dict[str, LoraFactors] = {}
    for module, f in modules.items():
        parts = _parts(module, layout)
        if not parts:
            found[module] = f
            continue
        start = 0
        for part, rows in zip(parts, _rows(module, f, len(parts), layout.mlp), strict=True):
            B = f.B[start : start + rows] if len(parts) > 1 else f.B
            found[part] = _ordered(LoraFactors(f.A, B.contiguous(), f.scaling, f.kind), part, layout)
            start += rows
    return found


def _numbered(module: str, start: str, separator: str) -> tuple[str, str] | None:
    """Number and layer of ``start`` + number + separator + layer."""
    hit = re.fullmatch(re.escape(start) + r"(\d+)" + re.escape(separator) + "(.+)", module)
    return (hit[1], hit[2]) if hit else None


def _parts(module: str, layout: Layout) -> tuple[str, ...]:
    """Diffusers' names of what a kohya module holds; () for one of another component."""
    for block in layout.blocks:
        if hit := _numbered(module, _ORIGINAL + block.original + "_", "_"):
            number, layer = hit
            if layer not in block.layers:
                raise InputError(f"module {module!r}: {layer!r} is no layer of {block.original} of {layout.name}")
            return tuple(f"{_DIFFUSERS}{block.diffusers}.{number}.{part}" for part in block.layers[layer])
    if not module.startswith(_ORIGINAL):
        return ()
    outside = module.removeprefix(_ORIGINAL)
    if outside not in layout.outside:
        raise InputError(f"module {module!r}: {outside!r} is no module of {layout.name}")
    return (_DIFFUSERS + layout.outside[outside],)


def _rows(module: str, f: LoraFactors, parts: int, mlp: int) -> list[int]:
    """Outputs of each part: queries, keys and values are as wide as their input, and an MLP is `mlp` times as wide."""
    out, width = f.shape
    if parts == 1:
        return [out]
    rows = [width] * 3 + ([mlp * width] if parts == 4 else [])
    if sum(rows) != out or min(rows) <= 0:
        raise InputError(f"module {module!r} is {f.shape}, which its {parts} parts do not fill")
    return rows


def _ordered(f: LoraFactors, part: str, layout: Layout) -> LoraFactors:
    """Shift and scale exchanged where diffusers has them the other way round: its own inverse."""
    out, width = f.shape
    always = part.removeprefix(_DIFFUSERS) in layout.swapped
    if not always and not (out == 2 * width and part.endswith(layout.swapped)):
        return f
    import torch

    first, second = f.B.chunk(2)
    return LoraFactors(f.A, torch.cat([second, first]), f.scaling, f.kind)


def put_together(modules: Mapping[str, LoraFactors], layout: Layout) -> tuple[dict[str, LoraFactors], dict[str, int]]:
    """Modules named as diffusers has them in the original layout, named as kohya's files name it; others keep theirs.

    Parts with one A and scaling get that A, and B's rows one under another: what was taken apart comes together bit by bit.
    A part that is not adapted has no update: rows of zeros.

    Returns:
        The modules, and "stacked" (fused layers whose parts had an A of their own: ranks added up) and "absent" (parts
        without an update) counts.

    Raises:
        InputError: A module that the model has not, or parts that are not as wide as their input.
    """
    found: dict[str, LoraFactors] = {}
    fused: dict[str, dict[str, LoraFactors]] = {}
    places = {d: (o, ps) for o, ps, d in _places(modules, layout)}
    for module, f in modules.items():
        if not module.startswith(_DIFFUSERS):
            found[module] = f
            continue
        if module not in places:
            raise InputError(
                f"module {module!r} is none of {layout.name}'s", hint="--layout diffusers keeps diffusers' names"
            )
        original, parts = places[module]
        if len(parts) == 1:
            found[original] = _ordered(f, module, layout)
        else:
            fused.setdefault(original, dict.fromkeys(parts))[module] = f  # type: ignore[arg-type]
    counts = {"stacked": 0, "absent": 0}
    for original, parts_of in fused.items():
        found[original] = _joined(original, parts_of, layout, counts)
    return found, counts


def _places(modules: Mapping[str, LoraFactors], layout: Layout) -> list[tuple[str, tuple[str, ...], str]]:
    """(kohya's name, all its parts, diffusers' name) of every module that the layout knows."""
    found: list[tuple[str, tuple[str, ...], str]] = [
        (_ORIGINAL + o, (_DIFFUSERS + d,), _DIFFUSERS + d) for o, d in layout.outside.items()
    ]
    for block in layout.blocks:
        places = {part: (layer, parts) for layer, parts in block.layers.items() for part in parts}
        for module in modules:
            hit = _numbered(module, f"{_DIFFUSERS}{block.diffusers}.", ".")
            if hit and hit[1] in places:
                layer, parts = places[hit[1]]
                whole = tuple(f"{_DIFFUSERS}{block.diffusers}.{hit[0]}.{p}" for p in parts)
                found.append((f"{_ORIGINAL}{block.original}_{hit[0]}_{layer}", whole, module))
    return found


def _joined(
    original: str, parts: Mapping[str, LoraFactors | None], layout: Layout, counts: dict[str, int]
) -> LoraFactors:
    """One fused layer from its parts in their order."""
    there = [f for f in parts.values() if f is not None]
    width = there[0].shape[1]
    heights = [width] * 3 + [layout.mlp * width] * (len(parts) - 3)
    if len(parts) > 3 and (last := list(parts.values())[-1]) is not None:
        heights[-1] = last.shape[0]
    for (name, f), height in zip(parts.items(), heights, strict=True):
        if f is not None and f.shape != (height, width):
            raise InputError(f"module {name!r} is {f.shape}; as a part of {original} it would be {(height, width)}")
    counts["absent"] += len(parts) - len(there)
    first, *rest = there
    import torch

    if all(f.scaling == first.scaling and torch.equal(f.A, first.A) for f in rest):
        rows = [f.B if f is not None else first.B.new_zeros(h, first.rank) for f, h in _pairs(parts, heights)]
        return LoraFactors(first.A, torch.cat(rows), first.scaling, first.kind)
    counts["stacked"] += 1
    return _block_diagonal(list(parts.values()), heights)


def _pairs(parts: Mapping[str, LoraFactors | None], heights: Sequence[int]) -> list[tuple[LoraFactors | None, int]]:
    return list(zip(parts.values(), heights, strict=True))


def _block_diagonal(parts: Sequence[LoraFactors | None], heights: Sequence[int]) -> LoraFactors:
    import torch

    there = [f for f in parts if f is not None]
    same = all(f.scaling == there[0].scaling for f in there)
    dtype = there[0].B.dtype
    for present in there:
        dtype = torch.promote_types(dtype, present.B.dtype)
    if not same:  # a scaling of its own goes into each part's B: in float32, which rounds by 6e-8 at most
        dtype = torch.promote_types(dtype, torch.float32)
    B = torch.zeros(sum(heights), sum(f.rank for f in there), dtype=dtype)
    row = column = 0
    for f, height in zip(parts, heights, strict=True):
        if f is not None:
            own = f.B.to(dtype) if same else f.B.to(dtype) * f.scaling
            B[row : row + height, column : column + f.rank] = own
            column += f.rank
        row += height
    A = torch.cat([f.A for f in there])
    return LoraFactors(A, B, there[0].scaling if same else 1.0, there[0].kind)
