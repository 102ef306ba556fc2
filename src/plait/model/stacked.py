"""Many adapters on one live model at once: the rows of a batch belong to members, each with its own factors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.adapters.lora import LINEAR, Adapter
from plait.errors import InputError, UsageError
from plait.model.layers import linear_shape


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """One module's updates for all members: delta_i = scaling_i * B_i @ A_i.

    Args:
        A: (members, rank, in).
        B: (members, out, rank).
        scaling: One number for all, or (members, 1, 1).
    """

    A: Float[Tensor, "members r in"]
    B: Float[Tensor, "members out r"]
    scaling: float | Tensor = 1.0


@contextlib.contextmanager
def stacked_updates(backbone: nn.Module, updates: Mapping[str, StackedFactors]) -> Iterator[None]:
    """Within the block, rows i*b to (i+1)*b of every batch go through W0 + delta_i.

    The base's product runs once on all rows; the updates are two batched products of rank r beside it.

    Args:
        backbone: Whose modules the updates name.
        updates: Module name -> factors. The first dimension of a module's input is a multiple of the members.
    """
    handles = [backbone.get_submodule(n).register_forward_hook(_hook(factors)) for n, factors in updates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(factors: StackedFactors) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    members = factors.A.shape[0]

    def add_updates(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].reshape(members, -1, factors.A.shape[2])
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        hidden = torch.bmm(x.to(dtype), factors.A.to(dtype).transpose(1, 2))
        flat = output.reshape(members, -1, output.shape[-1])
        if isinstance(factors.scaling, float):
            product = torch.baddbmm(flat, hidden, factors.B.to(dtype).transpose(1, 2), alpha=factors.scaling)
        else:
            product = torch.baddbmm(flat, hidden * factors.scaling.to(dtype), factors.B.to(dtype).transpose(1, 2))
        return product.view(output.shape)

    return add_updates


def by_member(tensor: Tensor, members: int) -> Tensor:
    """(members * b, ...) rows as (members, b, ...)."""
    return tensor.reshape(members, -1, *tensor.shape[1:])


def common_shapes(adapters: Sequence[Adapter], backbone: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(rank, out, in) of each module that any of the adapters touches: the largest rank, since zero rows change nothing.

    Raises:
        InputError: A module is not in the backbone, or its shape there is another.
        UsageError: An update is not of a linear module.
    """
    known = dict(backbone.named_modules())
    shapes: dict[str, tuple[int, int, int]] = {}
    for adapter in adapters:
        for name, f in adapter.modules.items():
            layer = known.get(name)
            if layer is None or getattr(layer, "weight", None) is None:
                raise InputError(
                    "no such module in the base model", where=name, hint="is this adapter of another base?"
                )
            if f.kind != LINEAR:
                raise UsageError(f"{f.kind} updates cannot be stacked", where=name, hint="train or score it alone")
            shape = linear_shape(layer)
            if shape not in (f.shape, f.shape[::-1]):
                raise InputError(f"the adapter's update is {f.shape}, the base's module {shape}", where=name)
            rank = max(f.rank, shapes.get(name, (0, 0, 0))[0])
            shapes[name] = (rank, *f.shape)
    return dict(sorted(shapes.items()))


def padded_factors(adapter: Adapter, name: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, float]:
    """A, B and scaling of one module, with zero rows up to the common rank; all zero where the adapter lacks it.

    A zero row of A beside a zero column of B has zero gradients, so it stays zero in training too.
    """
    rank, n_out, n_in = shape
    A, B = torch.zeros(rank, n_in, dtype=torch.float32), torch.zeros(n_out, rank, dtype=torch.float32)
    if name not in adapter.modules:
        return A, B, 1.0
    f = adapter.modules[name]
    A[: f.rank], B[:, : f.rank] = f.A.float(), f.B.float()
    return A, B, f.scaling
