"""Bases in four bits: those whose files hold them, and those that QLoRA quantised when it loaded them.

Both are held as the numbers that the four bits stand for, so that whatever comes after sees an ordinary base: nothing needs a
GPU or bitsandbytes. They take the memory of an ordinary base, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapters.tensors import read_layout, read_some, read_tensors, type_of
from plait.border.checked import LARGEST_INTEGER, Record, parsed_json
from plait.border.counts import plural
from plait.disk.store import read_json
from plait.errors import InputError
from plait.model.files import CONFIG, weight_files, weight_layout
from plait.model.layers import stored_flipped
from plait.model.nf4 import BLOCK, OUTER, InBlocks, through_nf4

# What `BaseModel.four_bits` may be; the first is what QLoRA, Axolotl, LLaMA-Factory and Unsloth write.
FOUR_BITS = ("nf4", "nf4-single")
# What records call such a base, however it came about.
QUANTISATION = "bitsandbytes-4bit"
_MARK = "in_four_bits"
_STATE = ".quant_state.bitsandbytes__"
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = ("float32", "bfloat16", "float16")
_LONGEST_STATE = 4096
_HINT = "download it again, whole, or use the full-precision base with --base-4bit nf4"


# --- quantised when it is loaded ------------------------------------------------------------------------------------------


def hold_in_four_bits(model: nn.Module, backbone: nn.Module, folder: Path, *, double: bool) -> None:
    """Give the linear layers of a loaded model the weights that they have in QLoRA.

    Which layers: the backbone's, but for the output embedding and those that the model's class keeps in float32, as
    transformers has it with `load_in_4bit`. **Deviates**: heads of classifiers stay as they are.

    Args:
        model: The task's, on the CPU; weights change in place.
        backbone: Its backbone.
        folder: Where it was loaded from: what is quantised are weights of the type that lies there.
        double: Whether the blocks' sizes are in 8 bits.

    Cost: about a second per 50 million weights.
    """
    stored = stored_dtype(folder)
    with torch.no_grad():
        for module, _ in linear_layers(model, backbone):
            module.weight.copy_(rounded(module, module.weight, stored, double=double))


def rounded(layer: nn.Module, weight: Tensor, stored: torch.dtype, *, double: bool) -> Tensor:
    """Quantise a weight of a linear layer, in the type that the base is stored in where that is the smaller, and back."""
    flipped = stored_flipped(layer)
    rows = weight.detach().T if flipped else weight.detach()
    held = rows.to(stored) if stored.itemsize < rows.dtype.itemsize else rows
    four = through_nf4(held, double=double).to(weight.dtype)
    return four.T.contiguous() if flipped else four


def linear_layers(model: nn.Module, backbone: nn.Module) -> Iterator[tuple[Any, str]]:
    """Go through the layers that QLoRA quantises, with their names in the backbone."""
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = outputs()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in backbone.named_modules():
        plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if plain and module is not output and not kept.intersection(name.split(".")):
            yield module, name


def stored_dtype(folder: Path) -> torch.dtype:
    """Read the type of a base's largest weight: what transformers loads it in, and quantises."""
    if is_in_four_bits(folder):
        return _quantised_from(folder)
    layout = weight_layout(folder)
    largest = max(layout, key=lambda n: math.prod(layout[n]["shape"]))
    return type_of(largest, layout[largest], folder)


def say_in_four_bits(*modules: nn.Module) -> None:
    """Mark a model as one in four bits, for what is recorded of it."""
    for module in modules:
        setattr(module, _MARK, QUANTISATION)


def said_in_four_bits(module: nn.Module) -> str | None:
    """Read the mark: what records call a model's quantisation; None for an ordinary one."""
    mark = getattr(module, _MARK, None)
    return mark if isinstance(mark, str) else None


# --- four bits in the files -----------------------------------------------------------------------------------------------


def is_in_four_bits(folder: Path) -> bool:
    """Whether a base's files hold four bits of bitsandbytes, by its config."""
    config = read_json(folder / CONFIG)
    quantised = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantised, Mapping):
        return False
    return quantised.get("quant_method") == "bitsandbytes" and quantised.get("load_in_4bit") is True


def unpacked_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a base whose files hold four bits, each weight as the numbers that they stand for.

    NF4 and FP4 alike: the table of values lies beside each weight.

    Returns:
        Every tensor by name, those of four bits in the type that they were quantised from.

    Raises:
        InputError: What lies beside a weight does not fit it.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)[0]
    states = {name.split(_STATE)[0]: name for name in tensors if _STATE in name}
    beside = {f"{weight}.{what}" for weight in states for what in _BESIDE} | set(states.values())
    return {
        name: _unpacked(name, tensors, states[name], str(folder)) if name in states else tensor
        for name, tensor in tensors.items()
        if name not in beside
    }


def _quantised_from(folder: Path) -> torch.dtype:
    """The type that weights of four bits were quantised from."""
    for path in weight_files(folder):
        names = [name for name in read_layout(path)[1] if _STATE in name]
        for name, state in read_some(path, names[:1]).items():
            dtype: torch.dtype = getattr(torch, _facts(name, state, str(folder)).text("dtype", choices=_DTYPES))
            return dtype
    raise InputError("its config says four bits, and no weight of them is there", where=str(folder), hint=_HINT)


def _facts(name: str, state: Tensor, where: str) -> Record:
    """What lies beside a weight as JSON: its shape, its type, and how its sizes are stored."""
    text = bytes(state.to(torch.uint8).flatten().tolist()).decode("utf-8", errors="replace")
    return Record.of(parsed_json(text, where, name, _LONGEST_STATE), where, inside=name, hint=_HINT)


def _unpacked(name: str, tensors: Mapping[str, Tensor], state: str, where: str) -> Tensor:
    facts = _facts(state, tensors[state], where)
    shape = facts.integers("shape", length=2)
    dtype: torch.dtype = getattr(torch, facts.text("dtype", choices=_DTYPES))
    block = facts.integer("blocksize", 1, LARGEST_INTEGER, BLOCK)

    def beside(what: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = tensors.get(f"{name}.{what}")
        if tensor is None or tensor.numel() != size or (dtype is not None and tensor.dtype != dtype):
            is_ = "absent" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise InputError(f"{name}.{what} is {is_}, expected {plural(size, 'number')}", where=where, hint=_HINT)
        return tensor.flatten()

    entries = math.prod(shape)
    blocks = -(-entries // block)
    packed = tensors[name].flatten().view(torch.uint8)
    if len(packed) != -(-entries // 2):
        raise InputError(
            f"{name} is {plural(len(packed), 'byte')}, expected {-(-entries // 2)}", where=where, hint=_HINT
        )
    if facts.has("nested_offset"):
        outer = facts.integer("nested_blocksize", 1, LARGEST_INTEGER, OUTER)
        of_sizes = InBlocks(
            beside("absmax", blocks, torch.uint8),
            beside("nested_absmax", -(-blocks // outer)).float(),
            beside("nested_quant_map", 256).float(),
            outer,
        )
        sizes = of_sizes.numbers() + torch.tensor(facts.number("nested_offset"), dtype=torch.float32)
    else:
        sizes = beside("absmax", blocks).float()
    places = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:entries]
    four = InBlocks(places, sizes, beside("quant_map", 16).float(), block)
    return four.numbers().view(shape).to(dtype)
