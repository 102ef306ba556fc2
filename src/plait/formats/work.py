"""An adapter on its way to plain LoRA: what was read, what may be used, what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.border.records import optional
from plait.errors import InputError
from plait.formats.base_weights import BaseWeights
from plait.formats.lowrank import Cut

_ROOT = "base_model.model."


@dataclass(frozen=True, slots=True)
class Means:
    """What a conversion may use.

    Args:
        base: Local folder of the base in safetensors: for DoRA and trained embeddings.
        initial: The adapter as it was before training: for PiSSA, OLoRA, CorDA and LoRA-GA.
        rank: At most, for what is not low rank; by default the adapter's own.
        drop_bias: Leave a bias of lora_bias out.
    """

    base: Path | None = None
    initial: Path | None = None
    rank: int | None = None
    drop_bias: bool = False


@dataclass(frozen=True, slots=True)
class WorstModule:
    """The module that a conversion changed most, and by how much of its own update."""

    module: str
    relative_error: float


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a conversion did.

    Args:
        what: What it did, in words.
        exact: Whether the update is unchanged.
        relative_error: |D - D'| / |D| over all modules it touched, where it is known.
        rank: The largest rank it left.
        errors_at: Rank -> the error that it would leave.
        worst: The module that it changed most.
        bias_norm: Norm of biases that were left out.
        component: Part of a pipeline that it was done to.
    """

    what: str
    exact: bool
    relative_error: float | None = optional()
    rank: int | None = optional()
    errors_at: Mapping[str, float] | None = optional()
    worst: WorstModule | None = optional(kind=WorstModule)
    bias_norm: float | None = optional()
    component: str | None = optional()


@dataclass(slots=True)
class Work:
    """An adapter on its way: config and tensors as read, deltas that were worked out, what was done."""

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    means: Means
    taken: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def taken(work: Work, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """Take the tensors with these endings out of those that were read; by the rest of their names."""
    found: dict[str, Tensor] = {}
    for key in [k for k in work.tensors if k.endswith(endings)]:
        ending = next(e for e in endings if key.endswith(e))
        found[key.removesuffix(ending).removeprefix(_ROOT)] = work.tensors.pop(key)
    return found


def step_of(what: str, cuts: Mapping[str, Cut]) -> Step:
    """Say how good the cuts of all modules are together: |D - D_k| / |D|."""
    total = sum(c.energy for c in cuts.values()) or 1.0
    errors = {m: (sum(c.lost[m] for c in cuts.values()) / total) ** 0.5 for m in (1, 2, 4, 8)}
    worst = max(cuts, key=lambda m: cuts[m].lost[1] / (cuts[m].energy or 1.0))
    rank = max(c.factors.rank for c in cuts.values())
    return Step(
        what,
        exact=errors[1] < 1e-6,
        relative_error=errors[1],
        rank=rank,
        errors_at={str(m * rank): e for m, e in errors.items()},
        worst=WorstModule(worst, (cuts[worst].lost[1] / (cuts[worst].energy or 1.0)) ** 0.5),
    )


def require_base(base: BaseWeights | None, what: str, work: Work) -> BaseWeights:
    """The base.

    Raises:
        InputError: None was given; it says what for.
    """
    if base is None:
        raise InputError(
            f"{what} is turned into plain LoRA with the base's weights only", where=str(work.folder), hint="--base DIR"
        )
    return base
