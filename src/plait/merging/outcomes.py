"""What other results of a merge than an adapter say of themselves: a baked model, and what ranks would lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.border.records import optional


@dataclass(frozen=True, slots=True)
class BakeRecord:
    """Say what was written into a base.

    Args:
        modules: How many took a delta.
        dtype: Types of their stored weights.
        beside: A line for each tensor of the adapter that is no LoRA factor.
        untied: Whether input and output embedding were one tensor and no longer are.
        rounding_error: |W' - (W + D)| / |D| over all weights, what the base's dtype took from the update.
        verification_error: The largest |W' x - (W x + D x)| / |W x + D x| of any module; None where nobody looked.
        labels: Head -> names of its classes, where any are known.
        method, weights, scale, scale_reason, tasks: How the adapters were merged, of a merge.
        base: What the adapter calls its base.
        license: The base's, where its card names one: the baked weights are mostly its own.
    """

    modules: int
    dtype: tuple[str, ...]
    beside: tuple[str, ...] = ()
    untied: bool = False
    rounding_error: float = 0.0
    verification_error: float | None = None
    labels: Mapping[str, Sequence[str]] | None = optional()
    method: str | None = optional()
    weights: tuple[float, ...] | None = optional()
    scale: float | None = optional()
    scale_reason: str | None = optional()
    tasks: tuple[str, ...] | None = optional()
    base: str | None = optional()
    license: str | None = optional()


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank of the curve.

    Args:
        rank: The largest rank of a module.
        discarded_energy: Fraction lost from the method's own delta; for a dense result the cut to R is in it already.
        verification_error: Difference of what is left after the cut from the inputs, as `merge` has it.
        size_mb: Size of the factors in float32.
        score: Quality of the adapter, where one was asked for.
        cut: How it was cut, where statistics were given, as `MergeRecord` has it; the fraction lost is then of what is put out.
    """

    rank: int
    discarded_energy: float
    verification_error: float
    size_mb: float
    score: float | None = optional()
    cut: str | None = optional()


@dataclass(frozen=True, slots=True)
class RankCurve:
    """A method's rows, by rank."""

    method: str
    curve: tuple[RankRow, ...]
