"""A GGUF adapter of llama.cpp read into an `Adapter`, with the base that tells its names and the order of its rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import EMBEDDING, LINEAR, Adapter, LoraFactors
from plait.adapters.naming import checked_name
from plait.adapters.tensors import all_finite
from plait.disk.store import sha256_file
from plait.errors import InputError
from plait.formats.gguf_file import base_config, gguf_field, require_gguf_seal
from plait.formats.gguf_names import gguf_layout, gguf_package, restored
from plait.formats.keys import PEFT
from plait.model.stored import base_tensors

_HALVES = {".lora_a": "A", ".lora_b": "B"}
_EMBEDDING = "token_embd.weight"


def read_gguf(path: Path, base: Path) -> Adapter:
    """Read a GGUF adapter as PEFT would have it.

    Scaling is `adapter.lora.alpha` / rank; an alpha of 0, or none, is scaling 1, as llama.cpp has it. Rows of q and k that
    llama.cpp orders its own way come back in transformers' order. Quantised factors are read as the numbers they stand for.

    Args:
        path: The file.
        base: Folder of the base: its config.json, and the names of its weights.

    Raises:
        Damaged: Written by plait, and changed since.
        InputError: No GGUF adapter of LoRA, of another architecture than the base, or damaged; names the tensor.
        EnvironmentFault: The package gguf is missing.
    """
    where = str(path)
    reader = opened_gguf(path)
    require_gguf_seal(reader, path)
    if (kind := gguf_field(reader, "adapter.type", path)) != "lora":
        raise InputError(
            f"adapter.type is {kind!r}: no LoRA adapter of llama.cpp", where=where, hint="a file for --lora"
        )
    stored = base_tensors(base)
    known = [t.removesuffix(".weight") for t, s in stored.items() if t.endswith(".weight") and len(s.shape) == 2]
    layout = gguf_layout(known, base_config(base), str(base))
    if (found := gguf_field(reader, "general.architecture", path)) != layout.architecture.name:
        raise InputError(
            f"it adapts a {found} model, and the base is {layout.architecture.name}", where=where, hint="another --base"
        )
    alpha = gguf_field(reader, "adapter.lora.alpha", path) or 0.0
    if not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise InputError(f"adapter.lora.alpha is {alpha}, expected a finite number of 0 or more", where=where)
    modules = {gguf: module for module, gguf in layout.names.items()}
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        suffix = next((s for s in _HALVES if tensor.name.endswith(s)), "")
        if not suffix:
            raise InputError(f"tensor {tensor.name!r} is no half of a LoRA", where=where)
        target = tensor.name.removesuffix(suffix)
        if target not in modules:
            raise InputError(
                f"the base has no weight that llama.cpp calls {target!r}", where=where, hint="another --base"
            )
        halves.setdefault(target, {})[_HALVES[suffix]] = _numbers(tensor, where)
    factors = {}
    for target, half in halves.items():
        module = modules[target]
        f = _factors(target, half, alpha, where)
        factors[module] = f if module not in layout.heads else _restored(f, layout.heads[module], module, where)
        if f.shape != (_shape(stored[f"{module}.weight"].shape, f.kind)):
            raise InputError(
                f"{target!r} is an update {f.shape} of a weight {stored[f'{module}.weight'].shape}", where=where
            )
    if not factors:
        raise InputError("holds no LoRA tensors", where=where)
    return Adapter(
        name=checked_name(path.name.removesuffix(".gguf"), "adapter"),
        base=str(base),
        modules=dict(sorted(factors.items())),
        task_type="CAUSAL_LM",
        source={"path": where, "sha256": sha256_file(path), "format": PEFT},
    )


def opened_gguf(path: Path) -> Any:
    """A reader of the package `gguf` on a file.

    Raises:
        InputError: No GGUF file, or a damaged one.
    """
    gguf = gguf_package()
    try:
        return gguf.GGUFReader(str(path))
    except (ValueError, OSError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as e:
        raise InputError(f"no GGUF file, or a damaged one: {e}", where=str(path)) from None


def _numbers(tensor: Any, where: str) -> Tensor:
    """A tensor in float32; of a quantised one, what its blocks stand for."""
    import gguf.quants

    try:
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except (NotImplementedError, ValueError) as e:
        raise InputError(f"{tensor.name!r}: {e}", where=where) from None
    found = torch.from_numpy(values)
    if found.ndim != 2 or not all_finite(found):
        raise InputError(f"{tensor.name!r} is {tuple(found.shape)}, expected a finite matrix", where=where)
    return found


def _factors(target: str, half: dict[str, Tensor], alpha: float, where: str) -> LoraFactors:
    if lacking := {"A", "B"} - half.keys():
        raise InputError(f"{target!r} has no lora_{lacking.pop().lower()}", where=where, hint="download it again")
    embedding = target == _EMBEDDING
    A, B = (half["A"].T.contiguous() if embedding else half["A"]), half["B"]
    if A.shape[0] != B.shape[1] or not A.shape[0]:
        raise InputError(f"{target!r}: A {tuple(A.shape)} and B {tuple(B.shape)} have no rank in common", where=where)
    return LoraFactors(A, B, alpha / A.shape[0] if alpha else 1.0, EMBEDDING if embedding else LINEAR)


def _restored(f: LoraFactors, heads: int, module: str, where: str) -> LoraFactors:
    try:
        return LoraFactors(f.A, restored(f.B, heads).contiguous(), f.scaling, f.kind)
    except ValueError as e:
        raise InputError(f"{module!r}: {e}", where=where, hint="another --base") from None


def _shape(stored: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Shape of an update as factors have it: embeddings are stored (vocabulary, width)."""
    return (stored[1], stored[0]) if kind == EMBEDDING else stored
