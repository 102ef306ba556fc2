"""What advice on merging is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from plait.learning.repair import TEXTS_TO_REPAIR


@dataclass(frozen=True, slots=True)
class AdviceSettings:
    """What advice is asked for.

    Args:
        tolerate: Share of what an adapter does beyond the base that may be lost, in [0, 1].
        repair: Steps at most of the repair that is tried.
        repair_from: Texts of every adapter below which a repair of classifiers is not tried.
        refine: Steps of learning the merge's weights.
        max_length: Tokens a text.
        seed: Seed of the order of the texts.
        answers, chat, new_tokens: How prompts are put, as `AutoSettings` has them.
    """

    tolerate: float = 0.1
    repair: int = 100
    repair_from: int = TEXTS_TO_REPAIR
    refine: int = 100
    max_length: int = 128
    seed: int = 0
    answers: bool | None = False
    chat: bool | None = None
    new_tokens: int = 64
