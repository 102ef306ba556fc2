"""An adapter on its way to plain LoRA: what was read, what may be used, what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

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


@dataclass(slots=True)
class Work:
    """An adapter on its way: config and tensors as read, deltas that were worked out, what was done."""

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    means: Means
    taken: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    done: list[dict[str, Any]] = field(default_factory=list)


def taken(work: Work, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """Take the tensors with these endings out of those that were read; by the rest of their names."""
    found: dict[str, Tensor] = {}
    for key in [k for k in work.tensors if k.endswith(endings)]:
        ending = next(e for e in endings if key.endswith(e))
        found[key.removesuffix(ending).removeprefix(_ROOT)] = work.tensors.pop(key)
    return found


def record_of(what: str, cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """How good the cuts of all modules are together: |D - D_k| / |D|."""
    total = sum(c.energy for c in cuts.values()) or 1.0
    errors = {m: (sum(c.lost[m] for c in cuts.values()) / total) ** 0.5 for m in (1, 2, 4, 8)}
    worst = max(cuts, key=lambda m: cuts[m].lost[1] / (cuts[m].energy or 1.0))
    rank = max(c.factors.rank for c in cuts.values())
    return {
        "what": what,
        "exact": errors[1] < 1e-6,
        "relative_error": errors[1],
        "rank": rank,
        "errors_at": {str(m * rank): e for m, e in errors.items()},
        "worst": {"module": worst, "relative_error": (cuts[worst].lost[1] / (cuts[worst].energy or 1.0)) ** 0.5},
    }


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
