"""Routers: modules that are no linear layer and apply a matrix of their own to their input, as a mixture's gate does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plait.errors import UsageError


def router_shape(module: nn.Module) -> tuple[int, int] | None:
    """Give (out, in) of a module's own matrix "weight", where it is none of torch's own layers; None for others."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or type(module).__module__.startswith("torch."):
        return None
    return weight.shape[0], weight.shape[1]


def is_gate(module: nn.Module) -> bool:
    """Whether "all-linear" takes a module: one with a matrix of its own, called a router or a gate by its class."""
    return router_shape(module) is not None and any(word in type(module).__name__ for word in ("Router", "Gate"))


def has_experts(module: nn.Module) -> bool:
    """Whether a module, or what PEFT has wrapped there, holds fused weights."""
    own = (m for m in module.modules() if not type(m).__module__.startswith("torch."))  # convolutions have such weights
    return any(p.ndim == 3 for m in own for p in m.parameters(recurse=False))


def linear_outputs(module: nn.Module, h: Tensor) -> Tensor:
    """Compute what a router's matrix makes of its input, before softmax and choice."""
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError("no router")
    return nn.functional.linear(h.to(weight.dtype), weight, getattr(module, "bias", None))


class _Applied(TorchFunctionMode):
    """Notes the matrices that `linear` is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is nn.functional.linear:
            self.seen.append(args[1] if len(args) > 1 else given["weight"])
        return func(*args, **given)


@contextmanager
def checked_routers(routers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run one example; each router's matrix must have been applied by `linear`, in whatever dtype.

    Raises:
        UsageError: One was not: what its matrix does is not known.
    """
    if not routers:
        yield
        return
    with _Applied() as applied:
        yield
    for name, module in routers.items():
        weight = module._parameters["weight"]
        if weight is None or not any(_same(weight, w) for w in applied.seen):
            raise UsageError(
                f"{type(module).__name__} does not apply its matrix as a linear layer does",
                where=name,
                hint="take it out of target_modules",
            )


def _same(weight: Tensor, other: Any) -> bool:
    return other is weight or (
        isinstance(other, Tensor) and other.shape == weight.shape and torch.equal(other.to(weight.dtype), weight)
    )
