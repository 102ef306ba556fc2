"""Many adapters on one live model at once: the rows of a batch belong to members, each with its own factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.adapters.lora import LINEAR, Adapter
from plait.errors import InputError, UsageError
from plait.model.applied import in_backbone, in_whole_model
from plait.model.base import backbone_of
from plait.model.hooks import Change, hooked
from plait.model.layers import linear_shape

# An adapter that the model computes with, and the multiple of its delta; None for the bare base.
Active = tuple[Adapter | None, float]


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


def stacked_updates(root: nn.Module, updates: Mapping[str, StackedFactors]) -> AbstractContextManager[None]:
    """Send rows i*b to (i+1)*b of every batch within the block through W0 + delta_i.

    The base's product runs once on all rows; the updates are two batched products of rank r beside it.

    Args:
        root: The module under which the updates' names are found.
        updates: Module name -> factors. The first dimension of a module's input is a multiple of the members.
    """
    return hooked((root.get_submodule(name), _update_of(factors)) for name, factors in updates.items())


def _update_of(factors: StackedFactors) -> Change:
    members = factors.A.shape[0]

    def add_updates(x: Tensor, output: Tensor) -> Tensor:
        x = x.reshape(members, -1, factors.A.shape[2])
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
    """Cut (members * b, ...) rows into (members, b, ...).

    >>> by_member(torch.arange(4), 2).tolist()
    [[0, 1], [2, 3]]
    """
    return tensor.reshape(members, -1, *tensor.shape[1:])


def common_shapes(adapters: Sequence[Adapter], backbone: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Find (rank, out, in) of each module that any of the adapters touches: the largest rank, since zero rows change nothing.

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
            if shape is None:
                raise UsageError(
                    f"a {type(layer).__name__}: its updates cannot be stacked",
                    where=name,
                    hint="train or score it alone",
                )
            if shape not in (f.shape, f.shape[::-1]):
                raise InputError(f"the adapter's update is {f.shape}, the base's module {shape}", where=name)
            rank = max(f.rank, shapes.get(name, (0, 0, 0))[0])
            shapes[name] = (rank, *f.shape)
    return dict(sorted(shapes.items()))


def padded_factors(adapter: Adapter, name: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, float]:
    """Pad A and B of one module with zero rows up to the common rank, beside its scaling; all zero where the adapter lacks it.

    A zero row of A beside a zero column of B has zero gradients, so it stays zero in training too.
    """
    rank, n_out, n_in = shape
    A, B = torch.zeros(rank, n_in, dtype=torch.float32), torch.zeros(n_out, rank, dtype=torch.float32)
    if name not in adapter.modules:
        return A, B, 1.0
    f = adapter.modules[name]
    A[: f.rank], B[:, : f.rank] = f.A.float(), f.B.float()
    return A, B, f.scaling


def stacked_factors(model: nn.Module, active: Sequence[Active], *, whole: bool = False) -> dict[str, StackedFactors]:
    """Put the factors of active adapters on the model's device, one stack a module, for `stacked_updates`.

    Scale and scaling are multiplied into B in float32, then both factors take the base's dtype. An adapter that occurs at
    several scales is put on the device once.

    Args:
        model: A task's model.
        active: Adapters in the order of the batch's rows.
        whole: Whether the updates will be given to the whole model; else to its backbone.

    Raises:
        InputError: A module is not in the model, or its shape there is another.
        UsageError: An update is not of a linear module.
    """
    root, rename = (model, in_whole_model) if whole else (backbone_of(model)[0], in_backbone)
    distinct = {id(a): rename(model, a) for a, _ in active if a is not None}
    like = next(p for p in root.parameters() if p.is_floating_point())
    # Place 0 is the bare base's: a delta of zero.
    places = {key: i for i, key in enumerate(distinct, 1)}
    which = [0 if a is None else places[id(a)] for a, _ in active]
    chosen = torch.tensor(which, dtype=torch.int64, device=like.device)
    scales = torch.tensor([s for _, s in active], dtype=torch.float32, device=like.device)[:, None, None]

    def stack(name: str, rank: int, n_out: int, n_in: int) -> StackedFactors:
        A = torch.zeros(1 + len(distinct), rank, n_in, dtype=torch.float32)
        B = torch.zeros(1 + len(distinct), n_out, rank, dtype=torch.float32)
        for i, adapter in enumerate(distinct.values(), 1):
            A[i], b, scaling = padded_factors(adapter, name, (rank, n_out, n_in))
            B[i] = b * scaling
        scaled = B.to(like.device).index_select(0, chosen) * scales
        return StackedFactors(A.to(like.device).to(like.dtype).index_select(0, chosen), scaled.to(like.dtype))

    return {name: stack(name, *shape) for name, shape in common_shapes(list(distinct.values()), root).items()}
