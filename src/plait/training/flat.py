"""The trained numbers of all members in one matrix, a row each, and AdamW on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ALIGNMENT = 8  # numbers; slots start at multiples of 16 bytes in half precision too
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's defaults


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one named tensor of some members lies.

    Args:
        name: Such as "encoder.layer.0.attn.q.A" or "head.classifier.weight".
        first, last: Rows, that is members, from `first` up to `last`.
        start: First column.
        shape: Shape of one member's tensor.
    """

    name: str
    first: int
    last: int
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers one member has here."""
        return int(torch.Size(self.shape).numel())

    def view(self, matrix: Tensor) -> Tensor:
        """View a slot as (members, *shape), sharing memory with the matrix."""
        block = matrix[self.first : self.last, self.start : self.start + self.size]
        return block.view(block.shape[0], *self.shape)


def lay_out(shapes: Sequence[tuple[str, int, int, tuple[int, ...]]], start: int = 0) -> tuple[list[Slot], int]:
    """Slots one after another for (name, first, last, shape); returns them and the columns used."""
    slots = []
    for name, first, last, shape in shapes:
        slot = Slot(name, first, last, start, shape)
        slots.append(slot)
        start += -(-slot.size // ALIGNMENT) * ALIGNMENT
    return slots, start


class FlatParameters:
    """Values, gradients and AdamW moments of all members.

    Autograd sees leaf tensors that are views of one matrix, and their gradients are added into another: one fill clears
    them all, one reduction along a row is a member's norm, one kernel updates everything.

    Args:
        slots: Where each tensor lies.
        columns: Width of the matrix.
        values: (members, columns) float32, the master copy.
        dtype: Dtype in which the forward pass sees them.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        values: Float[Tensor, "members columns"],
        dtype: torch.dtype,
    ) -> None:
        self.slots, self.values = list(slots), values
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)
        self._live = values if dtype == values.dtype else values.to(dtype)
        self.gradients = torch.zeros_like(values)  # float32 too: a step's passes add up in it
        self.leaves: dict[tuple[str, int], Tensor] = {}
        self._places: list[Tensor] = []
        for slot in slots:
            self.leaves[slot.name, slot.first] = slot.view(self._live).detach().requires_grad_()
            self._places.append(slot.view(self.gradients))

    def clear_gradients(self) -> None:
        """Set every gradient to zero."""
        self.gradients.zero_()

    def add_gradients(self, loss: Tensor) -> None:
        """Add the gradients of a scalar."""
        gradients = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        pairs = [(place, g) for place, g in zip(self._places, gradients, strict=True) if g is not None]
        torch._foreach_add_([place for place, _ in pairs], [g for _, g in pairs])

    @torch.no_grad()
    def step(self, gradients: Tensor, rates: Tensor, head_start: int, step: int, decay: Tensor | None = None) -> None:
        """Take one AdamW step of all members.

        Args:
            gradients: (members, columns), already scaled.
            rates: (2, members, 1) learning rates of the factors and of the head.
            head_start: Column where the heads begin.
            step: 1 for the first.
            decay: (members, columns) weight decay, or None for none.
        """
        if decay is not None:
            self.values[:, :head_start].mul_(1 - rates[0] * decay[:, :head_start])
            self.values[:, head_start:].mul_(1 - rates[1] * decay[:, head_start:])
        self.first.lerp_(gradients, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        denominator = self.second.sqrt().div_((1 - BETA2**step) ** 0.5).add_(EPS)
        update = torch.div(self.first, denominator, out=denominator).div_(1 - BETA1**step)
        self.values[:, :head_start].addcmul_(update[:, :head_start], rates[0], value=-1)
        self.values[:, head_start:].addcmul_(update[:, head_start:], rates[1], value=-1)

    def refresh(self) -> None:
        """Let the forward pass see the values of now."""
        if self._live is not self.values:
            self._live.copy_(self.values)


def tensors_of(slots: Sequence[Slot], row: Tensor, member: int) -> Mapping[str, Tensor]:
    """Read one member's tensors by name from its row of values."""
    mine = [s for s in slots if s.first <= member < s.last]
    return {s.name: row[s.start : s.start + s.size].reshape(s.shape).clone() for s in mine}
