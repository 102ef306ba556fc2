"""Updates of weights that no layer multiplies alone (fused experts, routers, convolutions), added to a live model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.adapters.lora import LoraFactors
from plait.errors import InputError


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A parameter of a live model, and what is added to it.

    Args:
        owner: The module that has the parameter.
        leaf: Its name there.
        parts: Number of an expert, or None for the whole weight -> the update's factors.
    """

    owner: nn.Module
    leaf: str
    parts: Mapping[int | None, LoraFactors]

    def added(self, scale: float) -> Tensor:
        """The weight with its updates, summed in float32 and rounded to the weight's dtype.

        Raises:
            InputError: An update of another shape, or an expert that the model does not have.
        """
        weight = self.owner._parameters[self.leaf]
        if weight is None:
            raise InputError("the base has no such weight", where=self.leaf)
        changed = weight.detach().clone()
        for number, factors in self.parts.items():
            if number is not None and number >= len(changed):
                raise InputError(f"the base has no expert {number} of {self.leaf!r}")
            target = changed if number is None else changed[number]
            delta = factors.delta().to(target.device)
            # GPT-OSS multiplies by its experts from the right
            delta = delta.T if number is not None and getattr(self.owner, "is_transposed", False) else delta
            if delta.numel() != target.numel() or delta.shape[0] != target.shape[0]:
                raise InputError(f"the adapter's update is {factors.shape}, the base's weight {tuple(target.shape)}")
            target.copy_((target.float() + scale * delta.reshape(target.shape)).to(target.dtype))
        return changed


@contextlib.contextmanager
def weights_added(updates: Sequence[WeightUpdate], scale: float) -> Iterator[None]:
    """Within the block, each owner holds its weight with the updates added; then the weight it had, to the bit.

    Unlike an update that runs beside a layer, the sum is rounded to the weight's dtype.

    Cost: one copy of every weight that is updated.
    """
    before = [(u.owner, u.leaf, u.owner._parameters[u.leaf]) for u in updates]
    try:
        with torch.no_grad():
            for update in updates:
                update.owner._parameters[update.leaf] = nn.Parameter(update.added(scale), requires_grad=False)
        yield
    finally:
        for owner, leaf, weight in before:
            owner._parameters[leaf] = weight
