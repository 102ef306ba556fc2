"""diffusers 0.42: what `load_lora_weights` makes of a file of factors, by its three ways of naming them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from plait.border.counts import agreed, plural
from plait.loading.account import Account, Fault, Placement
from plait.loading.contents import LoraFile
from plait.loading.header import Stored

VERSION = "0.42"
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_SCALE, _MAGNITUDE, _BIAS = (
    ".alpha",
    (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    ".lora_B.bias",
)
_NAMED = re.compile(r"\.lora_[AB]\.(?!weight$|bias$)\w+\.weight$")
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_KOHYA = {
    "lora_unet_": "unet or transformer", "lora_transformer_": "transformer", "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip
_AUTHORS = ("diffusion_model.", "model.diffusion_model.", "base_model.model.")
_AGAIN = "take the file from where it came, or plait convert writes it anew"


class Part(NamedTuple):
    """A tensor's module and what it is of it."""

    module: str
    kind: str


def part_of(tensor: str) -> Part | None:
    """A tensor's module and role; None for a name of no known kind."""
    for suffixes, kind in (
        (_DOWN, "down"),
        (_UP, "up"),
        ((_SCALE,), "alpha"),
        (_MAGNITUDE, "magnitude"),
        ((_BIAS,), "bias of up"),
    ):
        if found := next((s for s in suffixes if tensor.endswith(s)), None):
            return Part(tensor.removesuffix(found), kind)
    return None


def is_lora_file(file: LoraFile) -> bool:
    """Whether a file of tensors holds factors at all."""
    return any((part := part_of(t)) is not None and part.kind in ("down", "up") for t in file.header.tensors)


def diffusers_account(file: LoraFile) -> Account:
    """Every tensor of the file: by pairs, each with its alpha, under the component that its name starts with."""
    lines: dict[str, Placement] = {}
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    faults: list[Fault] = []
    for tensor, stored in file.header.tensors.items():
        part = part_of(tensor)
        if part is None:
            named = " (an adapter's name stands in it)" if _NAMED.search(tensor) else ""
            faults.append(Fault(tensor, f"is no name of factors{named}: refused or dropped, by the pipeline", _AGAIN))
            lines[tensor] = Placement(tensor, "", "unknown", "dropped")
        elif stored.is_empty:
            faults.append(
                Fault(
                    tensor, f"is empty, {list(stored.shape)}: a size mismatch", "gather the shards before saving", True
                )
            )
            lines[tensor] = Placement(tensor, "", part.kind, "refused")
        else:
            modules[part.module][part.kind] = tensor
            lines[tensor] = Placement(tensor, _home(part.module), part.kind, "loaded")
    for module, found in modules.items():
        faults += _pair_faults(module, found, file.header.tensors)
    return Account("diffusers", VERSION, tuple(lines.values()), tuple(_notes(file, modules)), tuple(faults), own=True)


def _home(module: str) -> str:
    """Where diffusers puts a module: component and name."""
    component, dot, rest = module.partition(".")
    if dot and component in COMPONENTS:
        return f"{component}.{rest}"
    if prefix := next((p for p in _KOHYA if module.startswith(p)), None):
        return f"{_KOHYA[prefix]}: {module.removeprefix(prefix)}"
    if any(module.startswith(p) for p in _AUTHORS):
        return f"transformer: {module}"
    return f"the model itself: {module}"


def _pair_faults(module: str, found: Mapping[str, str], tensors: Mapping[str, Stored]) -> Iterator[Fault]:
    halves = [k for k in ("down", "up") if k in found]
    if len(halves) < 2:
        first = next(iter(found.values()))
        yield Fault(
            first, f"stands for {module!r} without {'up' if halves == ['down'] else 'down'}: refused or dropped", _AGAIN
        )
        return
    down, up = tensors[found["down"]].shape, tensors[found["up"]].shape
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        yield Fault(found["down"], f"is {list(down)} beside {list(up)}: not of one rank", _AGAIN, True)
    if "alpha" in found and any(n != 1 for n in tensors[found["alpha"]].shape):
        yield Fault(found["alpha"], f"is {list(tensors[found['alpha']].shape)}, expected one number", _AGAIN, True)


def _notes(file: LoraFile, modules: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    without = sum("alpha" not in found for found in modules.values())
    if without and "lora_adapter_metadata" in file.header.metadata:
        yield "scalings stand in the header (lora_adapter_metadata), which diffusers reads from 0.34 on"
    elif without:
        verb, whose = agreed(without, "has", "have"), agreed(without, "its", "their")
        yield f"{without} of {plural(len(modules), 'module')} {verb} no alpha: {whose} scaling is 1"
    if any(m.startswith(_AUTHORS) or ("." in m and not m.startswith(COMPONENTS)) for m in modules):
        yield (
            "without a component of diffusers' before its names: pipelines turn the names of authors that they know, and "
            "pipe.transformer.load_lora_adapter(FILE, prefix=None) takes a model's own"
        )
