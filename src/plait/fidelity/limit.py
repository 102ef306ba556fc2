"""What a limit on how far general text is moved left out of a choice, for its record."""

from __future__ import annotations

from dataclasses import dataclass

from plait.border.records import nested


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A candidate at a scale that moves general text too far.

    Args:
        candidate: What tables call it.
        scale: Factor of its delta.
        score: How far the adapters are followed on average.
        general_kl: KL(base || merged) on general text, in nats.
    """

    candidate: str
    scale: float
    score: float
    general_kl: float


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit, and what it decided.

    Args:
        most: Most KL to the base on general text, in nats.
        tried: How many candidates at scales were looked at.
        left_out: Those of them that are beyond it, the one that follows its adapters best first.
        steps: What was made of the chosen one and taken back since it is beyond: "learnt weights", "the fit", "the repair", "learnt heads",
            "the heads that follow it".
    """

    most: float
    tried: int
    left_out: tuple[LeftOut, ...] = nested(LeftOut, ())
    steps: tuple[str, ...] = ()
