"""Distributions over large vocabularies, small enough to keep: the likeliest tokens, and what is left for all others together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Likeliest tokens that are kept. The others of a language model's next token share a few per cent.
TOP = 64


@dataclass(frozen=True, slots=True)
class TopTargets:
    """Next-token distributions, each as its likeliest tokens and one event more: any other token.

    Args:
        ids: The tokens, the likeliest first.
        logs: Natural logarithms of their probabilities.
        rest: Logarithm of the probability of all others together; minus infinity where there are none.
    """

    ids: Int[Tensor, "n k"]
    logs: Float[Tensor, "n k"]
    rest: Float[Tensor, " n"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n vocabulary"], top: int = TOP) -> TopTargets:
        """Keep the likeliest tokens of each distribution; all of them, where there are no more."""
        values = logits.float()
        best = values.topk(min(top, values.shape[-1]), dim=-1)
        whole = values.logsumexp(-1)
        return cls(best.indices.int(), best.values - whole[:, None], _others(values, best.indices) - whole)

    def take(self, places: Tensor) -> TopTargets:
        """Take the distributions at these places."""
        return TopTargets(self.ids[places], self.logs[places], self.rest[places])

    def kl(self, logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
        """KL(kept || other), both with the other tokens as one event, in nats.

        It is never above the divergence of the whole distributions, since events that are put together hide their differences,
        and is equal to it where every token is kept, or where the other model shares the rest out among the other tokens
        as the kept one does.

        Args:
            logits: The other model's; gradients go through them.

        Cost: two passes over the logits, no other distribution of that size.
        """
        values, ids = logits.float(), self.ids.long()
        whole = values.logsumexp(-1)
        theirs = values.gather(-1, ids) - whole[:, None]
        kl = (self.logs.exp() * (self.logs - theirs)).sum(-1)
        if ids.shape[-1] == values.shape[-1]:
            return kl
        return kl + self.rest.exp() * (self.rest - (_others(values, ids) - whole))


def joined(parts: list[TopTargets]) -> TopTargets:
    """Join targets one below the other."""
    return TopTargets(*(torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "logs", "rest")))


def _others(logits: Tensor, ids: Tensor) -> Tensor:
    """Log of the sum of the exponentials of all logits but those at `ids`."""
    return logits.scatter(-1, ids, float("-inf")).logsumexp(-1)
