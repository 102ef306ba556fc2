"""One module of a merge while it is distilled: weights for groups of its ranks, or its factors in units of their own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapters.lora import LoraFactors


@dataclass(frozen=True, slots=True)
class Student:
    """One module's factors while they learn, float32: units[1] B (w * units[0] A x).

    Args:
        A: (rank, in), in units of `units[0]`.
        B: (out, rank), in units of `units[1]`.
        w: One number for each group of ranks.
        owner: (rank,), the group of each.
        units: What A and B are multiplied by: with relative rates powers of two next to their root mean squares, so that Adam's steps are
            shares of them.
        parameters: What moves: w, or A and B.
    """

    A: Tensor
    B: Tensor
    w: Tensor
    owner: Tensor
    units: tuple[float, float]
    parameters: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, f: LoraFactors, learns: str, groups: Sequence[int] | None, device: torch.device, relative: bool
    ) -> Student:
        """Begin with a module's factors, which stay as they are.

        Args:
            f: The factors.
            learns: "weights" or "factors".
            groups: Sizes of the groups of ranks; by default one group.
            device: Where it learns.
            relative: Whether A and B are in units of their size.
        """
        folded = f.folded(device=device)
        units = (_unit(folded.A), _unit(folded.B)) if relative else (1.0, 1.0)
        A, B = folded.A / units[0], folded.B / units[1]  # copies: the merge itself must not move
        sizes = list(groups or [f.rank])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)).to(device)
        w = torch.ones(len(sizes), dtype=A.dtype, device=device)
        parameters = (w,) if learns == "weights" else (A, B)
        for p in parameters:
            p.requires_grad_(True)
        return cls(A, B, w, owner, units, parameters)

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the update to the module's output."""
        scaled = (x @ self.A.to(x.dtype).T) * (self.w[self.owner] * math.prod(self.units)).to(x.dtype)
        return output + scaled @ self.B.to(x.dtype).T

    def factors(self) -> LoraFactors:
        """Give the factors as they are now."""
        A, B = self.A * self.units[0], self.B * (self.w[self.owner] * self.units[1])
        return LoraFactors(A.detach().cpu(), B.detach().cpu())

    def learnt(self) -> tuple[float, ...]:
        """Give the weights as they are now."""
        return tuple(self.w.detach().cpu().tolist())


def _unit(factor: Tensor) -> float:
    """The root mean square of a factor, a power of two near it, so that dividing by it rounds nothing; 1 where all is zero."""
    return 2.0 ** round(math.log2(size)) if (size := float(factor.square().mean().sqrt())) else 1.0
