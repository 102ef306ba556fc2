"""What llama.cpp calls the modules of a language model, and how it orders the rows of two of them.

Names come from the table of llama.cpp's own `gguf` package. Rows of q and k: transformers rotates the two halves of a head
against each other, llama.cpp neighbouring pairs, so its converter reorders those weights for the architectures that it computes
as Llama; an update of them is reordered likewise, which concerns the rows of B alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from plait.border.counts import plural
from plait.errors import EnvironmentFault, InputError

MISSING = "pip install 'plait[gguf]'"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: `general.architecture`.
        reordered: Whether rows of q and k are.
    """

    name: str
    reordered: bool = False


# transformers' model_type -> llama.cpp's architecture: dense decoders whose weights its converter takes as they are, q and k
# aside. Others it renames, splits or stacks.
ARCHITECTURES = {
    "llama": Architecture("llama", reordered=True),
    "mistral": Architecture("llama", reordered=True),
    "smollm3": Architecture("smollm3", reordered=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "starcoder2": Architecture("starcoder2"),
    "gpt2": Architecture("gpt2"),
}


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """Where the modules of one base lie in llama.cpp.

    Args:
        architecture: Of the base.
        names: Module as transformers has it ("model.layers.0.self_attn.q_proj") -> its tensor ("blk.0.attn_q.weight").
        heads: Module whose rows are reordered -> number of heads that its rows are divided into.
    """

    architecture: Architecture
    names: Mapping[str, str]
    heads: Mapping[str, int]


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
        EnvironmentFault: It is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise EnvironmentFault(f"GGUF files need the package gguf ({e.name} is missing)", hint=MISSING) from None
    return gguf


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a base by its config.json.

    Raises:
        InputError: One whose names are not known here.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(
            f"model type {kind!r}: its names in llama.cpp are not known here",
            where=where,
            hint=f"known: {', '.join(ARCHITECTURES)}; llama.cpp's own convert_lora_to_gguf.py takes plait's folders",
        )
    return ARCHITECTURES[kind]


def gguf_layout(modules: Iterable[str], config: Mapping[str, Any], where: str) -> GgufLayout:
    """The names and orders of some modules of a base.

    Args:
        modules: As transformers names them in the whole model.
        config: The base's config.json.
        where: Names the base in errors.

    Raises:
        InputError: An unknown architecture, a module that llama.cpp does not know, or a config without sizes.
    """
    gguf = gguf_package()
    architecture = architecture_of(config, where)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = _size(config, ("num_hidden_layers", "n_layer"), where)
    table = gguf.get_tensor_name_map(known[architecture.name], layers)
    names, heads = {}, {}
    for module in modules:
        found = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if found is None:
            raise InputError(f"llama.cpp knows no tensor for {module!r}", where=where)
        names[module] = found
        if architecture.reordered and module.endswith((".q_proj", ".k_proj")):
            queries = _size(config, ("num_attention_heads",), where)
            own = config.get("num_key_value_heads") if module.endswith(".k_proj") else None
            heads[module] = queries if own is None else _size(config, ("num_key_value_heads",), where)
    if twice := next((n for n in names.values() if list(names.values()).count(n) > 1), None):
        raise InputError(f"two modules are {twice!r} in llama.cpp", where=where)
    return GgufLayout(architecture, names, heads)


def _size(config: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int:
    value = next((config[k] for k in keys if k in config), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
        raise InputError(f"{keys[0]} is {value!r}, expected a positive integer", where=where)
    return value


def reordered(rows: Float[Tensor, "out k"], heads: int) -> Float[Tensor, "out k"]:
    """Rows of q or k in llama.cpp's order: per head, the two halves interleaved.

    Raises:
        ValueError: The rows do not divide into so many heads of even size.
    """
    return rows.reshape(heads, 2, _half(rows, heads), -1).transpose(1, 2).reshape(rows.shape)


def restored(rows: Float[Tensor, "out k"], heads: int) -> Float[Tensor, "out k"]:
    """Rows of q or k in transformers' order again; see `reordered`."""
    return rows.reshape(heads, _half(rows, heads), 2, -1).transpose(1, 2).reshape(rows.shape)


def _half(rows: Tensor, heads: int) -> int:
    half, rest = divmod(rows.shape[0], 2 * heads)
    if rest:
        raise ValueError(f"{plural(rows.shape[0], 'row', 'is', 'are')} no {plural(heads, 'head')} of even size")
    return half
