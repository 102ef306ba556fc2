"""An adapter on a live model: forward hooks that add the update and leave again, weights untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from plait.adapters.lora import EMBEDDING, Adapter, LoraFactors
from plait.errors import InputError
from plait.model.base import backbone_of


@contextlib.contextmanager
def applied(model: nn.Module, adapter: Adapter | None, scale: float = 1.0) -> Iterator[None]:
    """Within the block, the model computes with ``W0 + scale * delta``; None or scale 0 leaves it bare.

    The update runs beside the base as LoRA does, in the factors' dtype (float32), so it is as exact for a half-precision
    or quantised base as for a float32 one.

    Args:
        model: A task's model or a backbone.
        adapter: Module names relative to the backbone.
        scale: Multiple of every delta.

    Raises:
        InputError: A module of the adapter is not in the model, or its shape differs.
    """
    handles = []
    try:
        if adapter is not None and scale != 0.0:
            for name, factors in adapter.modules.items():
                module = resolve(model, name, adapter.prefix)
                device = next(module.parameters()).device
                handles.append(module.register_forward_hook(_hook(factors.folded(device=device), scale, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def resolve(model: nn.Module, name: str, prefix: str = "") -> nn.Module:
    """The module of that name: relative to the backbone, else in the whole model."""
    modules: Mapping[str, nn.Module] = dict(backbone_of(model)[0].named_modules())
    if name in modules:
        return modules[name]
    whole = dict(model.named_modules())
    for full in (f"{prefix}.{name}" if prefix else name, name):
        if full in whole:
            return whole[full]
    raise InputError("no such module in the base model", where=name, hint="is this adapter of another base?")


def in_backbone(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with module names relative to the backbone; a text adapter's on disk are the whole model's."""
    backbone, prefix = backbone_of(model)
    if not any(prefix and name.startswith(f"{prefix}.") for name in adapter.modules):
        return adapter
    inside = {name for name, _ in backbone.named_modules()}
    short = {
        name: name.removeprefix(f"{prefix}.") if prefix and name not in inside else name for name in adapter.modules
    }
    if all(name == key for key, name in short.items()):
        return adapter
    return replace(adapter, modules={short[name]: f for name, f in adapter.modules.items()}, prefix=prefix)


def _hook(factors: LoraFactors, scale: float, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    A, B = factors.A, factors.B * scale

    def add_update(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if factors.kind == EMBEDDING:
            return output + (A.T[x] @ B.T).to(output.dtype)
        if x.shape[-1] != A.shape[1] or output.shape[-1] != B.shape[0]:
            found = (output.shape[-1], x.shape[-1])
            raise InputError(f"the adapter's update is {factors.shape}, the base's module {found}", where=name)
        return output + ((x.to(A.dtype) @ A.T) @ B.T).to(output.dtype)

    return add_update
