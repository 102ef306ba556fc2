"""Original layouts of transformers beside diffusers': Flux and Stable Diffusion 3, as kohya's files name their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from plait.errors import InputError, UsageError
from plait.formats.fused import Block, Layout, is_original
from plait.formats.names import require_distinct

_STREAM = ("attn.to_q", "attn.to_k", "attn.to_v")
_CONTEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_TIMES = "time_text_embed."

FLUX = Layout(
    "flux",
    (
        Block(
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn_qkv": _STREAM,
                "img_attn_proj": ("attn.to_out.0",),
                "img_mlp_0": ("ff.net.0.proj",),
                "img_mlp_2": ("ff.net.2",),
                "img_mod_lin": ("norm1.linear",),
                "txt_attn_qkv": _CONTEXT,
                "txt_attn_proj": ("attn.to_add_out",),
                "txt_mlp_0": ("ff_context.net.0.proj",),
                "txt_mlp_2": ("ff_context.net.2",),
                "txt_mod_lin": ("norm1_context.linear",),
            },
        ),
        Block(
            "single_blocks",
            "single_transformer_blocks",
            {"linear1": (*_STREAM, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)},
        ),
    ),
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in_in_layer": f"{_TIMES}timestep_embedder.linear_1",
        "time_in_out_layer": f"{_TIMES}timestep_embedder.linear_2",
        "vector_in_in_layer": f"{_TIMES}text_embedder.linear_1",
        "vector_in_out_layer": f"{_TIMES}text_embedder.linear_2",
        "guidance_in_in_layer": f"{_TIMES}guidance_embedder.linear_1",
        "guidance_in_out_layer": f"{_TIMES}guidance_embedder.linear_2",
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    },
    swapped=("norm_out.linear",),
    third="text_encoder_2",
)
SD3 = Layout(
    "sd3",
    (
        Block(
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block_attn_qkv": _STREAM,
                "x_block_attn_proj": ("attn.to_out.0",),
                "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block_attn2_proj": ("attn2.to_out.0",),
                "x_block_mlp_fc1": ("ff.net.0.proj",),
                "x_block_mlp_fc2": ("ff.net.2",),
                "x_block_adaLN_modulation_1": ("norm1.linear",),
                "context_block_attn_qkv": _CONTEXT,
                "context_block_attn_proj": ("attn.to_add_out",),
                "context_block_mlp_fc1": ("ff_context.net.0.proj",),
                "context_block_mlp_fc2": ("ff_context.net.2",),
                "context_block_adaLN_modulation_1": ("norm1_context.linear",),
            },
        ),
    ),
    {
        "x_embedder_proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder_mlp_0": f"{_TIMES}timestep_embedder.linear_1",
        "t_embedder_mlp_2": f"{_TIMES}timestep_embedder.linear_2",
        "y_embedder_mlp_0": f"{_TIMES}text_embedder.linear_1",
        "y_embedder_mlp_2": f"{_TIMES}text_embedder.linear_2",
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    },
    swapped=("norm_out.linear", "norm1_context.linear"),
)
LAYOUTS = {layout.name: layout for layout in (FLUX, SD3)}
# What stands before the names of the original layouts where they are written with dots: nothing, what ComfyUI's loaders
# expect, or PEFT's own wrapper.
_COMFY = ("diffusion_model.", "model.diffusion_model.")
_PREFIXES = ("", *_COMFY, "base_model.model.")
_FLUX2 = re.compile(r"flux[._\- ]?2", re.I)
DIFFUSERS_NAMES, BY_BASE = "diffusers", "auto"
# What a base is called -> its layout. FLUX.2 has other blocks than Flux, so it is not taken for it.
_BASES = ((re.compile(r"flux(?![._\- ]?2)", re.I), FLUX), (re.compile(r"stable-diffusion-3|sd[-_]?3", re.I), SD3))


def layout_for(base: str, wanted: str = BY_BASE) -> Layout | None:
    """The original layout that modules named as diffusers has them are to take in kohya's files; None keeps their names.

    Args:
        base: What the adapter's base is called: modules alone do not tell (SD3's attention is named as Flux's is).
        wanted: "auto" goes by the base's name, "flux" and "sd3" say it, "diffusers" keeps diffusers' names.

    Raises:
        UsageError: An unknown layout.
    """
    if wanted == BY_BASE:
        return next((layout for name, layout in _BASES if name.search(base)), None)
    if wanted != DIFFUSERS_NAMES and wanted not in LAYOUTS:
        known = ", ".join((BY_BASE, *LAYOUTS, DIFFUSERS_NAMES))
        raise UsageError(f"unknown layout {wanted!r}", hint=f"one of {known}")
    return LAYOUTS.get(wanted)


def dotted(modules: Iterable[str]) -> tuple[str, Layout] | None:
    """The prefix and layout of modules that are named with dots as the model's authors have them; None for others.

    Any of a layout's blocks under one prefix tells; names that the layout has not are refused when they are turned.
    """
    names = list(modules)
    for layout in LAYOUTS.values():
        blocks = "|".join(b.original for b in layout.blocks)
        for prefix in _PREFIXES:
            block = re.compile(rf"{re.escape(prefix)}({blocks})\.\d+\.")
            if any(block.match(n) for n in names):
                return prefix, layout
    return None


def original_prefix(modules: Iterable[str]) -> str | None:
    """What stands before names that a model's own authors gave; None where they are others'.

    A layout known here tells them, and so does ComfyUI's prefix, whichever model's blocks follow.
    """
    names = list(modules)
    if (found := dotted(names)) is not None:
        return found[0]
    return next((p for p in _COMFY if any(n.startswith(p) for n in names)), None)


def dotted_to_kohya(modules: Iterable[str]) -> dict[str, str]:
    """Such names -> kohya's: dots become underscores under ``lora_unet_``; modules outside the prefix keep theirs.

    Raises:
        InputError: Two that would become one.
    """
    names = list(modules)
    prefix = original_prefix(names)
    if prefix is None:
        return {n: n for n in names}
    found = {n: f"lora_unet_{n.removeprefix(prefix).replace('.', '_')}" if n.startswith(prefix) else n for n in names}
    require_distinct(found)
    return found


def require_known(base: str) -> None:
    """Refuse to take FLUX.2 for Flux, whose names it shares.

    Raises:
        InputError: The base is called FLUX.2: its MLPs and modulations are others.
    """
    if _FLUX2.search(base):
        raise InputError(
            f"{base} has blocks of Flux's names and another inside, and its layout is not known here",
            hint="merge files of it in the format they have",
        )


def original_layout(modules: Iterable[str]) -> Layout | None:
    """The original layout that a kohya file's names are in; None for one named as diffusers has it."""
    names = list(modules)
    return next((layout for layout in LAYOUTS.values() if any(is_original(m, layout) for m in names)), None)
