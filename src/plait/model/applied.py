"""One adapter on a live model for a while: beside its layers, and in the weights that no layer multiplies alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from plait.adapters.experts import stacks_of
from plait.adapters.lora import EMBEDDING, EXPERT, Adapter, LoraFactors
from plait.errors import InputError
from plait.model.base import backbone_of
from plait.model.hooks import Change, hooked
from plait.model.layers import linear_shape
from plait.model.weights import WeightUpdate, weights_added


@contextmanager
def applied(model: nn.Module, adapter: Adapter | None, scale: float = 1.0) -> Iterator[None]:
    """Compute with ``W0 + scale * delta`` within the block; None or scale 0 leaves the model bare.

    The update of a layer runs beside the base as LoRA does, in the factors' dtype (float32), so it is as exact for a
    half-precision or quantised base as for a float32 one. Fused experts, routers and convolutions have no such layer: their
    weights hold the sum within the block (`weights_added`), rounded to the base's dtype.

    Args:
        model: A task's model or a backbone.
        adapter: Module names relative to the backbone.
        scale: Multiple of every delta.

    Raises:
        InputError: On entering, a module of the adapter is not in the model; in a pass, its shape differs.
    """
    if adapter is None or scale == 0.0:
        yield
        return
    layers, weights = _places(model, adapter)
    with hooked(_changes(layers, adapter, scale)), weights_added(weights, scale):
        yield


def without_layers(model: nn.Module, adapter: Adapter) -> list[str]:
    """List the modules of an adapter whose update cannot run beside a layer: fused experts, routers, convolutions.

    Raises:
        InputError: A module of the adapter is not in the model.
    """
    layers, _ = _places(model, adapter)
    return [name for name in adapter.modules if name not in layers]


def _changes(layers: Mapping[str, nn.Module], adapter: Adapter, scale: float) -> Iterator[tuple[nn.Module, Change]]:
    for name, module in layers.items():
        device = next(module.parameters()).device
        yield module, update_of(adapter.modules[name].folded(device=device), name, scale)


def _places(model: nn.Module, adapter: Adapter) -> tuple[dict[str, nn.Module], list[WeightUpdate]]:
    """The layers beside which an update runs, by the adapter's names, and the weights to which one is added."""
    weights = []
    for parameter, experts in stacks_of(adapter.modules).items():
        owner, _, leaf = parameter.rpartition(".")
        module = resolve(model, owner, adapter.prefix)
        if not isinstance(module._parameters.get(leaf), nn.Parameter):
            raise InputError("the base's experts are not fused into such a weight", where=parameter)
        weights.append(WeightUpdate(module, leaf, dict(experts.items())))
    layers: dict[str, nn.Module] = {}
    for name, factors in adapter.modules.items():
        if factors.kind == EXPERT:
            continue
        module = resolve(model, name, adapter.prefix)
        if _is_layer(module, factors):
            layers[name] = module
        else:
            weights.append(WeightUpdate(module, "weight", {None: factors}))
    return layers, weights


def _is_layer(module: nn.Module, factors: LoraFactors) -> bool:
    """Whether a module's output is its weight times its input: what has no plain weight is one (quantised layers)."""
    weight = module._parameters.get("weight")
    if factors.kind == EMBEDDING or linear_shape(module) is not None or weight is None:
        return True
    return not weight.is_floating_point() or weight.numel() != factors.shape[0] * factors.shape[1]


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
    full = f"{prefix}.{name}" if prefix else name
    for owner, path in ((backbone_of(model)[0], name), (model, full), (model, name)):
        if (module := _within(owner, path)) is not None:
            return module
    raise InputError("no such module in the base model", where=name, hint="is this adapter of another base?")


def _within(owner: nn.Module, path: str) -> nn.Module | None:
    """Follow a dotted path; None where it leads nowhere. A list of all names would be made again for every module asked for."""
    module: nn.Module | None = owner
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return module


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
