"""A model taken apart into backbone and head: the head's tensors copied out, put in, and drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import InputError
from plait.seeds import named_seed

_HEAD_STD = 0.02  # initializer_range of BERT and its kin; configs without the field get the same
_NEW = "_plait_new"  # attribute of a task's model: what of its head nobody draws, as it was before anything trained it


def backbone_of(model: nn.Module) -> tuple[nn.Module, str]:
    """Find the model without its task head, and the attribute it hangs on ("" where the model is its own backbone).

    >>> backbone_of(nn.Linear(2, 2))
    (Linear(in_features=2, out_features=2, bias=True), '')
    """
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    backbone = getattr(model, prefix, None) if prefix else None
    return (backbone, prefix) if isinstance(backbone, nn.Module) else (model, "")


def head_modules(model: nn.Module) -> list[str]:
    """Top-level modules with parameters outside the backbone: PEFT's `modules_to_save` for a fresh head."""
    _, prefix = backbone_of(model)
    if not prefix:
        return []
    shared = {id(p) for p in getattr(model, prefix).parameters()}
    return [
        name
        for name, child in model.named_children()
        if name != prefix and any(id(p) not in shared for p in child.parameters())
    ]


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the head's tensors, named as in the task's model, to the CPU."""
    return {k: v.detach().cpu().clone() for k, v in _head_tensors(model).items()}


def _head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The head's own tensors, named as in the task's model; the backbone is not looked through for them."""
    found = {name: model.get_submodule(name).state_dict() for name in head_modules(model)}
    return {f"{name}.{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


def _of_other_classes(own: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> str | None:
    """Say so where two heads differ in their number of outputs alone, as where no row is of the last class."""
    pairs = [(own[n].shape, head[n].shape) for n in own if n in head and own[n].shape != head[n].shape]
    if own.keys() != head.keys() or any(a[1:] != b[1:] for a, b in pairs):
        return None
    here, there = pairs[0][0][0], pairs[0][1][0]
    return f"the head has {there} outputs, the rows name {here} classes: give the task its `labels`, all of them"


def load_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Put a head's tensors into a task's model.

    Raises:
        InputError: A tensor is missing, unknown or of another shape: a head of another task or base.
    """
    own = _head_tensors(model)
    for name in sorted({*own, *head}):
        if name not in own or name not in head or own[name].shape != head[name].shape:
            got = tuple(head[name].shape) if name in head else "absent"
            expected = tuple(own[name].shape) if name in own else "absent"
            raise InputError(
                f"head tensor is {got}, the model expects {expected}", where=name, hint=_of_other_classes(own, head)
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(head[name])


def draw_head(model: nn.Module, seed: int, start: float = 0.0) -> None:
    """Draw every linear layer of the head anew; each from its own generator, so that order does not matter.

    All else of the head (norms) is put back to what the base has for it, whatever head was in the model last.

    Args:
        model: A task's model.
        seed: Seed of the drawing.
        start: Bias of the last layer of a head with one output (the mean target of a regression).
    """
    _put_new(model, _new_of(model))
    std = initial_std(model)
    for name in head_modules(model):
        for inner, module in model.get_submodule(name).named_modules():
            if isinstance(module, nn.Linear):
                draw_linear(module, seed, f"{name}.{inner}", std, start if module.out_features == 1 else 0.0)


def begin_head(view: nn.Module, model: nn.Module) -> None:
    """Give a head without values what the base has for its norms; its linear layers are drawn, or loaded, afterwards.

    Args:
        view: A task's model that shares the backbone of `model`; its head may hold anything.
        model: As it was loaded, or made so itself.

    Raises:
        InputError: A tensor that is of no linear layer differs in shape between the two.
    """
    _put_new(view, _new_of(model))
    view.__dict__[_NEW] = _new_of(model)


def _new_of(model: nn.Module) -> Mapping[str, Tensor]:
    """What of a head is no linear layer's, as it is when this is first asked of a model: when it has just been loaded."""
    if _NEW not in model.__dict__:
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        model.__dict__[_NEW] = {k: v for k, v in head_state(model).items() if k.rpartition(".")[0] not in linear}
    new: Mapping[str, Tensor] = model.__dict__[_NEW]
    return new


def _put_new(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = model.state_dict() if tensors else {}
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise InputError(
                f"a new layer of the head that is not linear, {tuple(tensor.shape)} in the base", where=name
            )
        own[name].copy_(tensor)


def initial_std(model: nn.Module) -> float:
    """Standard deviation of a layer that is drawn, by the model's config."""
    config: Any = model.config
    return float(getattr(config, "initializer_range", None) or _HEAD_STD)


def draw_linear(module: nn.Module, seed: int, name: str, std: float, bias: float = 0.0) -> None:
    """Draw a linear layer's weight, normal with deviation `std`, from a generator of its own; its bias is a constant."""
    if not isinstance(module, nn.Linear):
        raise InputError("a new layer that is not linear", where=name, hint="a base that holds it")
    generator = torch.Generator().manual_seed(named_seed(seed, name))
    drawn = torch.empty(module.weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        module.weight.copy_(drawn)
        if module.bias is not None:
            module.bias.fill_(bias)
