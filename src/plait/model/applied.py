"""One adapter on a live model: its update runs beside the base and leaves again, weights untouched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, nn

from plait.adapters.lora import EMBEDDING, Adapter, LoraFactors
from plait.errors import InputError
from plait.model.base import backbone_of
from plait.model.hooks import Change, hooked


def applied(model: nn.Module, adapter: Adapter | None, scale: float = 1.0) -> AbstractContextManager[None]:
    """Compute with ``W0 + scale * delta`` within the block; None or scale 0 leaves the model bare.

    The update runs beside the base as LoRA does, in the factors' dtype (float32), so it is as exact for a half-precision
    or quantised base as for a float32 one.

    Args:
        model: A task's model or a backbone.
        adapter: Module names relative to the backbone.
        scale: Multiple of every delta.

    Raises:
        InputError: On entering, a module of the adapter is not in the model; in a pass, its shape differs.
    """
    return hooked(_changes(model, adapter, scale) if adapter is not None and scale != 0.0 else ())


def _changes(model: nn.Module, adapter: Adapter, scale: float) -> Iterator[tuple[nn.Module, Change]]:
    for name, factors in adapter.modules.items():
        module = resolve(model, name, adapter.prefix)
        device = next(module.parameters()).device
        yield module, update_of(factors.folded(device=device), name, scale)


def update_of(factors: LoraFactors, name: str, scale: float = 1.0) -> Change:
    """Add ``scale * delta x`` to a module's output, in the factors' dtype.

    >>> import torch
    >>> delta = LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 0.5)
    >>> update_of(delta.folded(), "query")(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 3)).tolist()
    [[2.0, 2.0, 2.0]]

    Args:
        factors: The delta, its scaling folded in (`LoraFactors.folded`).
        name: Name of the module, for the message.
        scale: Multiple of the delta.

    Raises:
        InputError: When called, from the change: the module has another shape than the delta.
    """
    A, B = factors.A, factors.B * scale

    def add_update(x: Tensor, output: Tensor) -> Tensor:
        if factors.kind == EMBEDDING:
            return output + (A.T[x] @ B.T).to(output.dtype)
        if x.shape[-1] != A.shape[1] or output.shape[-1] != B.shape[0]:
            shape = (output.shape[-1], x.shape[-1])
            raise InputError(f"the adapter's update is {factors.shape}, the base's module {shape}", where=name)
        return output + ((x.to(A.dtype) @ A.T) @ B.T).to(output.dtype)

    return add_update


# --- names of modules -------------------------------------------------------------------------------------------------


def resolve(model: nn.Module, name: str, prefix: str = "") -> nn.Module:
    """Look a module up: by its name relative to the backbone, else in the whole model.

    Raises:
        InputError: No such module.
    """
    modules: Mapping[str, nn.Module] = dict(backbone_of(model)[0].named_modules())
    if name in modules:
        return modules[name]
    whole: Mapping[str, nn.Module] = dict(model.named_modules())
    for full in (f"{prefix}.{name}" if prefix else name, name):
        if full in whole:
            return whole[full]
    raise InputError("no such module in the base model", where=name, hint="is this adapter of another base?")


def in_backbone(model: nn.Module, adapter: Adapter) -> Adapter:
    """Name an adapter's modules relative to the backbone; a text adapter's on disk are the whole model's."""
    backbone, prefix = backbone_of(model)
    if not any(prefix and name.startswith(f"{prefix}.") for name in adapter.modules):
        return adapter
    inside = {name for name, _ in backbone.named_modules()}
    short = {name: name if name in inside else name.removeprefix(f"{prefix}.") for name in adapter.modules}
    if all(name == key for key, name in short.items()):
        return adapter
    return replace(adapter, modules={short[name]: f for name, f in adapter.modules.items()}, prefix=prefix)


def in_whole_model(model: nn.Module, adapter: Adapter) -> Adapter:
    """Name an adapter's modules as in the whole model, its head included."""
    prefix = backbone_of(model)[1]
    whole = dict(model.named_modules())
    names = {m: m if m in whole else f"{prefix}.{m}" for m in adapter.modules}
    return replace(adapter, modules={names[m]: f for m, f in adapter.modules.items()})
