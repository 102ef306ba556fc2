"""What `merge auto` may be told."""

from __future__ import annotations

from dataclasses import dataclass

from plait.choosing.candidates import METHODS, SCALES
from plait.errors import UsageError
from plait.fidelity.texts import LIMIT


@dataclass(frozen=True, slots=True)
class AutoSettings:
    """What `merge_auto` may be told.

    Args:
        methods, scales: What is tried.
        refine: Steps in which the winner's weights per adapter and module are learnt from the texts; 0 for none.
        fit: Whether the winner is also fitted to the adapters' outputs on the texts, front to back.
        repair: Steps at most in which all adapters are distilled into the winner's factors, after the cut to rank; 0 for none.
        repair_from: Texts of every adapter below which a repair of classifiers is not tried.
        on_policy: Whether the merge writes after the prompts and the adapters judge it while it is repaired; causal adapters only.
        texts: Texts of each adapter that the choice reads; a repair, heads and what is measured at the end read all. Of text models
            without a repair nothing reads more.
        heads: Whether the last layer of every classifier's head is fitted to the merged model, where that is closer.
        learn_heads: Whether copies of the heads are learnt together with the merge's weights, and taken where that is closer still.
        max_shift: Most KL to the base on the general texts, in nats: whatever moves the model further is left out.
        answers: Whether texts are prompts and adapters are followed in their own answers; None where they are if the adapters are causal.
        chat: Whether prompts go through the tokenizer's chat template, which means answers; None where tokenizer and adapters decide
            (`plait.fidelity.chat.chat_of`).
        new_tokens: Tokens of such an answer, at most.
        rank: Cut the result to this rank.
        max_length: Tokens a text.
        batch_size: Texts a pass, where a model is asked alone.
        seed: Seed of the order of the texts.
    """

    methods: tuple[str, ...] = METHODS
    scales: tuple[float, ...] = SCALES
    refine: int = 100
    fit: bool = True
    repair: int = 0
    repair_from: int = 0
    on_policy: bool = False
    texts: int = LIMIT
    heads: bool = True
    learn_heads: bool = False
    max_shift: float | None = None
    answers: bool | None = False
    chat: bool | None = None
    new_tokens: int = 64
    rank: int | None = None
    max_length: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not self.scales:
            raise UsageError("nothing to try: methods and scales must not be empty")
        if any(not 0 < s < 100 for s in self.scales):
            raise UsageError(f"scales {list(self.scales)}, expected numbers above 0")
        if self.max_shift is not None and not self.max_shift > 0:
            raise UsageError(f"max_shift is {self.max_shift:g}, expected nats above 0")
        if self.on_policy and not self.repair:
            raise UsageError("on_policy is a way to repair, and no repair is asked for", hint="--repair auto")
        if min(self.texts, self.new_tokens) < 1:
            raise UsageError("texts and new_tokens are at least 1")
        if min(self.refine, self.repair, self.repair_from) < 0 or (self.rank is not None and self.rank < 1):
            raise UsageError("steps must not be negative, and a rank is at least 1")
