"""The tensor names of LoRA files: which module and which half a name means, and which names are no plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plait.adapters.key_names import kinds_of_names
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MIDDLE, TUCKER = "mid", "lora_mid"  # what a Tucker-decomposed convolution has between A and B; its tensors' name
KOHYA, DIFFUSERS, PEFT = "kohya", "diffusers", "peft"
ORIGINAL = "original"  # modules named, with dots, as the model's own authors have them: double_blocks.0.img_attn.qkv
MLX = "mlx"  # mlx-lm's folders
FORMATS = (PEFT, KOHYA, DIFFUSERS, ORIGINAL, MLX)
# Piece of a tensor's name -> the variant it gives away, and why it is no plain LoRA.
REFUSED = {
    "hada_": ("LoHa", "the update is an entrywise product of two low-rank matrices, which is not low rank"),
    "lokr_": ("LoKr", "the update is a Kronecker product, which is not low rank"),
    "oft_": ("OFT", "it rotates the base's weights and adds nothing to them"),
    "boft_": ("BOFT", "it rotates the base's weights and adds nothing to them"),
    "dora_scale": ("DoRA", "it also trains a magnitude per output, and its update depends on the base's weights"),
    "lora_magnitude_vector": (
        "DoRA",
        "it also trains a magnitude per output, and its update depends on the base's weights",
    ),
    "diff": ("full difference", "it holds whole weight differences instead of factors"),
    "on_input": ("IA3", "it scales activations and adds nothing to the weights"),
    "a1.weight": ("GLoRA", "its update depends on the base's weights"),
    "b1.weight": ("GLoRA", "its update depends on the base's weights"),
    "w_norm": ("trained norms", "they are no linear layers"),
    "b_norm": ("trained norms", "they are no linear layers"),
    "bundle_emb": ("trained embeddings", "they are no update of a module"),
    "lora_B.bias": ("lora_bias", "a bias is outside the factors"),
    "lora_up.bias": ("a trained bias", "a bias is outside the factors"),
}
_KOHYA_SUFFIXES = {".lora_down.weight": "A", ".lora_up.weight": "B", f".{TUCKER}.weight": MIDDLE}
_DIFFUSERS_SUFFIXES = {  # suffix -> (half, layout)
    ".lora_A.weight": ("A", "lora_A"),
    ".lora_B.weight": ("B", "lora_A"),
    ".lora_linear_layer.down.weight": ("A", "lora_linear_layer"),
    ".lora_linear_layer.up.weight": ("B", "lora_linear_layer"),
    ".lora.down.weight": ("A", "lora.down"),
    ".lora.up.weight": ("B", "lora.down"),
    "_lora.down.weight": ("A", "lora.down"),  # of an attention processor: ...attn1.processor.to_q_lora
    "_lora.up.weight": ("B", "lora.down"),
}
# diffusers' first names for projections of a text encoder, and of the output projection everywhere.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LAYOUTS = {"lora_A": ("lora_A", "lora_B"), "lora.down": ("lora.down", "lora.up")}
_LAYOUTS["lora_linear_layer"] = ("lora_linear_layer.down", "lora_linear_layer.up")
_LAYOUTS["lora_down"] = ("lora_down", "lora_up")  # kohya's words behind names with dots


@dataclass(slots=True)
class Parsed:
    """What a file's names say.

    Args:
        format: "kohya" or "diffusers" ("original" is told by modules, not by tensors; see `formats.layouts`).
        halves: Module -> {"A": tensor, "B": tensor}, as stored; with a "mid" where a convolution has one between them.
        alphas: Module -> alpha tensor.
        layouts: diffusers' component (or whatever stands before the first dot) -> which of its spellings the file uses.
    """

    format: str
    halves: dict[str, dict[str, Tensor]]
    alphas: dict[str, Tensor]
    layouts: dict[str, str]


def parse(tensors: Mapping[str, Tensor], where: str) -> Parsed:
    """Sort a file's tensors into halves and alphas by module.

    Raises:
        InputError: A variant that is no plain LoRA (named, with the reason), both formats at once, a name that means
            nothing here, a half twice or a half missing.
    """
    refuse_keys(tensors, where)
    found = Parsed("", {}, {}, {})
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        hit = _kohya(key) or _diffusers(key)
        if hit is None:
            unknown.append(key)
            continue
        kind, module, half, layout = hit
        if found.format not in ("", kind):
            raise InputError(
                f"{key!r} is {kind}'s and others are {found.format}'s", where=where, hint="one format a file"
            )
        found.format = kind
        if half in found.halves.setdefault(module, {}):
            raise InputError(f"module {module!r} has lora_{half} twice, the second is {key!r}", where=where)
        found.halves[module][half] = tensor
        if layout:
            found.layouts.setdefault(module.partition(".")[0], layout)
    if not found.halves:
        raise InputError(f"holds no LoRA factors, but {kinds_of_names(tensors)}", where=where)
    if unknown:
        raise InputError(f"tensor {unknown[0]!r} belongs to no LoRA known here", where=where)
    _alphas(tensors, found, where)
    return found


def variant_of(tensors: Mapping[str, object]) -> tuple[str, str] | None:
    """The refused variant that a file's names give away, and the reason."""
    return next((why for key in tensors for piece, why in REFUSED.items() if _gives_away(key, piece)), None)


def _gives_away(key: str, piece: str) -> bool:
    """Whether a dotted part of the key begins with the piece (for ``diff``: is it, or is ``diff_b``)."""
    if piece == "diff":
        return key.endswith((".diff", ".diff_b"))
    return key.startswith(piece) or f".{piece}" in key


def refuse_keys(tensors: Mapping[str, object], where: str) -> None:
    """Raise for the first tensor of a variant that is no plain LoRA."""
    for key in tensors:
        for piece, (name, why) in REFUSED.items():
            if _gives_away(key, piece):
                raise InputError(f"{name} ({key!r}): {why}", where=where, hint="only plain LoRA files can be merged")


def _kohya(key: str) -> tuple[str, str, str, str] | None:
    """Kohya's words make a file kohya's only where its names have no dots either: with them it is a spelling of the others."""
    for suffix, half in _KOHYA_SUFFIXES.items():
        if key.endswith(suffix):
            module = key.removesuffix(suffix)
            return (DIFFUSERS, module, half, "lora_down") if "." in module else (KOHYA, module, half, "")
    return None


def _diffusers(key: str) -> tuple[str, str, str, str] | None:
    for suffix, (half, layout) in _DIFFUSERS_SUFFIXES.items():
        if key.endswith(suffix):
            module = key.removesuffix(suffix).replace(".processor.", ".")
            if suffix.startswith("_"):
                module = _old_projection(module)
            return DIFFUSERS, module, half, layout
    return None


def _old_projection(module: str) -> str:
    """``attn1.to_out`` -> ``attn1.to_out.0``, and in text encoders ``self_attn.to_q`` -> ``self_attn.q_proj``."""
    start, _, last = module.rpartition(".")
    if module.startswith("text_encoder") and last in _OLD_TEXT:
        return f"{start}.{_OLD_TEXT[last]}"
    return f"{module}.0" if last == "to_out" else module


def _alphas(tensors: Mapping[str, Tensor], found: Parsed, where: str) -> None:
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            module = key.removesuffix(".alpha").replace(".processor.", ".")
            if module not in found.halves:
                raise InputError(f"{key!r} belongs to no module of the file", where=where)
            found.alphas[module] = tensor
    for module, pair in found.halves.items():
        if lacking := {"A", "B"} - pair.keys():
            half = "down (A)" if "A" in lacking else "up (B)"
            raise InputError(f"module {module!r} has no {half}", where=where, hint="incomplete: download it again")


def tensor_names(format: str, module: str, layouts: Mapping[str, str]) -> tuple[str, str]:
    """Names of a module's A and B in a format; a component without a recorded spelling gets today's."""
    if format == KOHYA:
        return f"{module}.lora_down.weight", f"{module}.lora_up.weight"
    component = module.partition(".")[0]
    usual = "lora_linear_layer" if component.startswith("text_encoder") else "lora_A"
    a, b = _LAYOUTS[layouts.get(component, usual)]
    return f"{module}.{a}.weight", f"{module}.{b}.weight"
