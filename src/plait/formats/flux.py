"""Flux in kohya's files: its original layout fuses projections that diffusers keeps apart, and their updates come apart exactly.

A fused projection stacks its parts' outputs, so its update B A splits by B's rows: every part has A, and its own rows of B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from plait.adapters.lora import LoraFactors
from plait.errors import InputError

_BLOCK = re.compile(r"lora_unet_(double|single)_blocks_(\d+)_(.+)")
# Layer of a double block -> where it is in diffusers' block; several where it is fused.
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}


def is_flux(module: str) -> bool:
    """Whether a kohya name is of Flux's original layout."""
    return _BLOCK.fullmatch(module) is not None


def taken_apart(modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """The modules of a kohya file with Flux's blocks as diffusers has them; others keep their kohya names.

    Raises:
        InputError: A layer that Flux has not, or one whose parts do not fill it.
    """
    found: dict[str, LoraFactors] = {}
    for module, f in modules.items():
        block = _BLOCK.fullmatch(module)
        if block is None:
            found[module] = f
            continue
        kind, number, layer = block.groups()
        parts = (_DOUBLE if kind == "double" else _SINGLE).get(layer)
        if parts is None:
            raise InputError(f"module {module!r}: {layer!r} is no layer of a {kind} block of Flux")
        root = f"transformer.{'single_' if kind == 'single' else ''}transformer_blocks.{number}"
        start = 0
        for part, rows in zip(parts, _rows(module, f, len(parts)), strict=True):
            B = f.B[start : start + rows] if len(parts) > 1 else f.B
            found[f"{root}.{part}"] = LoraFactors(f.A, B.contiguous(), f.scaling, f.kind)
            start += rows
    return found


def _rows(module: str, f: LoraFactors, parts: int) -> list[int]:
    """Outputs of each part: queries, keys and values are as wide as their input, and an MLP has what is left."""
    out, width = f.shape
    if parts == 1:
        return [out]
    rows = [width] * 3 + ([out - 3 * width] if parts == 4 else [])
    if sum(rows) != out or min(rows) <= 0:
        raise InputError(f"module {module!r} is {f.shape}, which its {parts} parts do not fill")
    return rows
