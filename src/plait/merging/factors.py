"""Factors of one module or of several stacked: methods written for any dimensions in front take both."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from plait.adapters.lora import LINEAR, LoraFactors
from plait.errors import InputError


class PartingError(Exception):
    """Members of a stack would not be treated alike (a fallback of one, another count): each is to be computed alone."""


@dataclass(frozen=True, slots=True)
class FactorStack(LoraFactors):
    """The factors of several modules: A (n, rank, in), B (n, out, rank); rank and shape are those of each."""

    def __post_init__(self) -> None:
        if self.A.ndim != 3 or self.B.ndim != 3 or self.A.shape[1] != self.B.shape[2]:
            raise InputError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are no stack of factors")

    def members(self) -> list[LoraFactors]:
        """The factors of each module; views."""
        return [LoraFactors(a, b, self.scaling, self.kind) for a, b in zip(self.A, self.B, strict=True)]


def factors_of(A: Float[Tensor, "... r in"], B: Float[Tensor, "... out r"], kind: str = LINEAR) -> LoraFactors:
    """Factors of scaling 1: of a module, or of a stack."""
    return LoraFactors(A, B, 1.0, kind) if A.ndim == 2 else FactorStack(A, B, 1.0, kind)


def common_count(which: Float[Tensor, "... k"]) -> int:
    """How many along the last dimension are true, where that is one number for all members.

    Raises:
        PartingError: It is not.
    """
    counts = which.sum(-1).flatten().tolist()
    if any(count != counts[0] for count in counts):
        raise PartingError
    return int(counts[0])
