"""Module names between kohya and diffusers: kohya writes ``lora_unet_down_blocks_0``, diffusers ``unet.down_blocks.0``.

Dots lost to underscores come back by a list of the words that contain one; a name with anything else in it is refused
rather than guessed. Kohya's SDXL files name the U-Net's blocks as its first release did (``input_blocks_4_1``): another
numbering of the same modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from plait.errors import InputError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# kohya's first word -> diffusers' component; "lora_te_" is the only text encoder of its model, "lora_te1_" one of several.
COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
# Names with underscores, by model: U-Nets, text encoders, transformers as diffusers builds them.
_COMPOUND = _words("""
down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks to_q to_k to_v to_out conv_in conv_out
conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 proj_in proj_out
text_model self_attn q_proj k_proj v_proj out_proj text_projection wi_0 wi_1
add_q_proj add_k_proj add_v_proj to_add_out ff_context proj_mlp norm1_context norm_out x_embedder context_embedder
time_text_embed timestep_embedder guidance_embedder text_embedder pos_embed class_embedding temp_attentions temp_convs
cross_attn
""")
_SIMPLE = _words("""
attentions resnets downsamplers upsamplers conv conv1 conv2 attn attn1 attn2 ff net proj encoder layers mlp fc1 fc2 block
layer SelfAttention DenseReluDense EncDecAttention q k v o wi wo linear norm norm1 norm2 norm3 embeddings blocks
""")
# Inside a residual block: the first release's names -> diffusers'.
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_PER_BLOCK = 3  # two layers and a change of resolution


def to_diffusers(name: str) -> str:
    """Name a kohya module as diffusers does.

    Raises:
        InputError: An unknown component or word.

    >>> to_diffusers("lora_unet_down_blocks_0_attentions_0_proj_in")
    'unet.down_blocks.0.attentions.0.proj_in'
    """
    prefix = next((p for p in COMPONENTS if name.startswith(p)), None)
    if prefix is None:
        raise InputError(f"module {name!r} starts with none of {', '.join(COMPONENTS)}", hint=_KEEP)
    rest = name.removeprefix(prefix)
    if prefix == "lora_unet_" and rest.startswith("blocks_"):
        raise InputError(
            f"module {name!r} is of no U-Net: its blocks are a transformer's own, unknown here", hint=_KEEP
        )
    inner = _from_first_release(rest) if prefix == "lora_unet_" else None
    return f"{COMPONENTS[prefix]}.{inner or _dotted(rest, name)}"


def to_kohya(name: str, *, several: bool, first_release: bool) -> str:
    """Name a diffusers module as kohya does.

    Args:
        name: Starting with its component.
        several: Whether the model has more than one text encoder ("lora_te1_" instead of "lora_te_").
        first_release: Number the U-Net's blocks as SDXL's first release did.

    Raises:
        InputError: An unknown component, or a module that could not be told from another afterwards.

    >>> to_kohya("text_encoder.text_model.encoder.layers.0.mlp.fc1", several=False, first_release=False)
    'lora_te_text_model_encoder_layers_0_mlp_fc1'
    """
    component, _, rest = name.partition(".")
    if component not in COMPONENTS.values():
        raise InputError(
            f"module {name!r}: {component!r} is no component known to kohya",
            hint=f"one of {', '.join(sorted(set(COMPONENTS.values())))}; --component says what a PEFT folder belongs to",
        )
    prefix = {"text_encoder": "lora_te1_" if several else "lora_te_"}.get(component) or next(
        p for p, c in COMPONENTS.items() if c == component
    )
    inner = _to_first_release(rest) if first_release and component == "unet" else rest.replace(".", "_")
    if to_diffusers(prefix + inner) != name:
        raise InputError(f"module {name!r} cannot be written as kohya names modules and read back", hint=_KEEP)
    return prefix + inner


_KEEP = "merge and write it in the format it has; only a change of format needs the names"


def kohya_names(modules: Iterable[str], *, several: bool = False) -> dict[str, str]:
    """Each diffusers module name -> kohya's, in the numbering its model calls for.

    SDXL is told by what other U-Nets lack: a second text encoder, added embeddings, or attention more than one block deep.

    Args:
        modules: Diffusers' names.
        several: Whether the model is known to have more than one text encoder, whichever of them are adapted.
    """
    names = list(modules)
    several = several or any(n.startswith("text_encoder_2.") for n in names)
    deep = re.compile(r"unet\..*attentions\.\d+\.transformer_blocks\.[1-9]")
    first_release = several or any("add_embedding" in n or deep.match(n) for n in names)
    return {n: to_kohya(n, several=first_release, first_release=first_release) for n in names}


def diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """Each kohya module name -> diffusers'; one that is diffusers' already stays.

    Raises:
        InputError: Two that would become one.
    """
    renaming = {n: n if n.partition(".")[0] in COMPONENTS.values() else to_diffusers(n) for n in modules}
    require_distinct(renaming)
    return renaming


def require_distinct(renaming: Mapping[str, str]) -> None:
    """Refuse a renaming that gives two modules one name.

    Raises:
        InputError: Names both.
    """
    origins: dict[str, str] = {}
    for name, other in renaming.items():
        if other in origins:
            raise InputError(f"modules {origins[other]!r} and {name!r} are both {other!r}")
        origins[other] = name


def _dotted(rest: str, name: str) -> str:
    words, at = [], 0
    while at < len(rest):
        hit = next((m for m in _matches(rest, at) if m == len(rest) or rest[m] == "_"), None)
        if hit is None:
            raise InputError(
                f"module {name!r}: {rest[at:]!r} does not start with a word whose dots are known", hint=_KEEP
            )
        words.append(rest[at:hit])
        at = hit + 1
    return ".".join(words)


def _matches(text: str, start: int) -> list[int]:
    """Ends of all words that begin here, the longest first."""
    ends = [start + len(w) for w in (*_COMPOUND, *_SIMPLE) if text.startswith(w, start)]
    number = re.compile(r"\d+").match(text, start)
    return sorted({*ends, *([number.end()] if number else [])}, reverse=True)


# --- the first release's numbering ------------------------------------------------------------------------------------


def _from_first_release(rest: str) -> str | None:
    """Diffusers' name of a U-Net module, or None where it is not numbered that way."""
    if rest in _OUTSIDE:
        return _OUTSIDE[rest]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", rest):
        place = ("resnets.0", "attentions.0", "resnets.1")[int(middle[1])]
        return f"mid_block.{place}.{_inside(middle[2], place)}"
    block = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", rest)
    if block is None:
        return None
    side, number, part, inside = block[1], int(block[2]) - (block[1] == "input"), int(block[3]), block[4]
    where = f"{'down' if side == 'input' else 'up'}_blocks.{number // _PER_BLOCK}"
    if inside in ("op", "conv"):
        return f"{where}.{'downsamplers' if side == 'input' else 'upsamplers'}.0.conv"
    place = f"{('resnets', 'attentions', 'upsamplers')[part]}.{number % _PER_BLOCK}"
    return f"{where}.{place}.{_inside(inside, place)}"


def _inside(rest: str, place: str) -> str:
    if place.startswith("resnets"):
        if rest not in _RESNET:
            raise InputError(f"{rest!r} is no layer of a residual block", hint=_KEEP)
        return _RESNET[rest]
    return _dotted(rest, rest)


def _to_first_release(rest: str) -> str:
    outside = {v: k for k, v in _OUTSIDE.items()}
    if rest in outside:
        return outside[rest]
    resnet = {v: k for k, v in _RESNET.items()}
    if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", rest):
        number = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        inside = resnet.get(middle[3]) if middle[1] == "resnets" else None
        return f"middle_block_{number}_{inside or middle[3].replace('.', '_')}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", rest)
    if block is None:
        return rest.replace(".", "_")
    down, number, inside = block[1] == "down", int(block[2]) * _PER_BLOCK, block[5]
    side, first = ("input_blocks", number + 1) if down else ("output_blocks", number)
    if block[3] in ("downsamplers", "upsamplers"):
        return f"{side}_{first + 2}_{'0_op' if down else '2_conv'}"
    layer = first + int(block[4])
    return (
        f"{side}_{layer}_0_{resnet.get(inside, inside)}"
        if block[3] == "resnets"
        else f"{side}_{layer}_1_{inside.replace('.', '_')}"
    )
