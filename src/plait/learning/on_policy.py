"""The distillation loss on policy: the merge writes after the prompts, and each text's own adapter judges every token of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import UsageError
from plait.evaluation.writing import Writers, endings, write_ids
from plait.fidelity.language import positions
from plait.fidelity.own_answers import prompts_of_part, row_of
from plait.fidelity.panel import WRITTEN, Panel
from plait.learning.teachers import SMALLEST_KL, Applying
from plait.model.applied import applied
from plait.model.attention import fused_attention
from plait.model.stacked import Active, stacked_factors, stacked_updates
from plait.tasks import collate, to_device

Row = dict[str, Any]


class OnPolicyLoss:
    """KL(merge || adapter) at the tokens that the merge itself writes, over KL(base || adapter) there.

    Off policy a merge is shown what its adapters write, and never learns how to go on from a beginning that only it would have
    written. Here it is judged on its own beginnings, by that text's adapter. What was written is a few steps old at most
    (`plait.learning.distil.AHEAD`); no gradient goes through the writing. At each token the whole distributions are compared, so that
    the gradient is exact there and only the beginnings are drawn.

    Args:
        panel: Base, causal adapters, and prompts as their texts.
        seed: Seed of what is drawn.

    Raises:
        UsageError: Of models that do not write from left to right.

    Cost: beside a step off policy, the adapters' own pass over what was written, and the writing: one step a token.

    Source: Agarwal et al., On-policy distillation of language models (GKD), ICLR 2024, arXiv:2306.13649, with many teachers.
    **Deviates**: tokens are drawn from the merge alone, never taken from a corpus; every part's divergence is relative to the bare base's.
    """

    def __init__(self, panel: Panel, seed: int = 0) -> None:
        if any(part.task.kind != "causal" for part in panel.parts):
            raise UsageError(
                "on policy a merge writes, and these adapters are not causal", hint="leave --on-policy out"
            )
        self.panel, self.model = panel, panel.model(panel.parts[0])
        self.prompts = [prompts_of_part(panel, part) for part in panel.parts]
        self.draws = torch.Generator(panel.base.torch_device).manual_seed(seed)
        ends = endings(self.model, panel.tokenizer, None, panel.base.torch_device)
        self.writers = Writers(self.model, panel.tokenizer, ends, panel.new_tokens, draws=self.draws)
        active: list[list[Active]] = [[(part.adapter, 1.0)] for part in panel.parts]
        self.teachers = [stacked_factors(self.model, one, whole=True) for one in active]
        self.written: dict[tuple[int, int], Row] = {}
        self.rooms: list[float] = []

    def prepare(self, coming: Sequence[Sequence[Sequence[int]]], applying: Applying) -> None:
        """Let the merge write after all prompts of the next steps, together."""
        wanted = list(dict.fromkeys((i, n) for rows in coming for i, places in enumerate(rows) for n in places))
        asked = [self.prompts[i][n] for i, n in wanted]
        with applying():
            [answers] = write_ids(self.writers, asked)
        self.written = {key: row_of(prompt, answer) for key, prompt, answer in zip(wanted, asked, answers, strict=True)}
        if not self.rooms:
            self.rooms = [self._room(i) for i in range(len(self.panel.parts))]

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """Mean over parts of KL(merge || adapter) a token, over KL(base || adapter)."""
        batch = self._batch([(i, n) for i, places in enumerate(rows) for n in places])
        with fused_attention(self.model), applying():
            logits, mask = positions(self.model, "causal", batch, 1, WRITTEN)
        counts = mask.sum(1).view(len(rows), -1).sum(1).tolist()
        total, at = logits.new_zeros((), dtype=torch.float32), 0
        for i, merged in enumerate(torch.split(logits[0], counts)):
            own = {k: v[at : at + len(rows[i])] for k, v in batch.items()}
            total = total + reverse_kl(merged, self._judged(i, own)).mean() / self.rooms[i]
            at += len(rows[i])
        return total / len(rows)

    def _batch(self, keys: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        return to_device(
            collate(self.panel.tokenizer, [self.written[key] for key in keys]), self.panel.base.torch_device
        )

    @torch.no_grad()
    def _judged(self, part: int, batch: Mapping[str, Tensor]) -> Tensor:
        """An adapter's logits at the tokens that were written, (tokens, vocabulary)."""
        with fused_attention(self.model), stacked_updates(self.model, self.teachers[part]):
            return positions(self.model, "causal", batch, 1, WRITTEN)[0][0]

    @torch.no_grad()
    def _room(self, part: int) -> float:
        """KL(base || adapter) a token, where the merge wrote first."""
        total, tokens = 0.0, 0
        keys = [key for key in self.written if key[0] == part]
        for start in range(0, len(keys), self.panel.batch_size):
            batch = self._batch(keys[start : start + self.panel.batch_size])
            with fused_attention(self.model), applied(self.model, None):
                bare = positions(self.model, "causal", batch, 1, WRITTEN)[0][0]
            kl = reverse_kl(bare, self._judged(part, batch))
            total, tokens = total + float(kl.sum(dtype=torch.float64)), tokens + len(kl)
        return max(total / max(1, tokens), SMALLEST_KL)


def reverse_kl(merged: Tensor, own: Tensor) -> Tensor:
    """KL(merge || adapter) of each position, from logits (n, vocabulary); gradients go through the merge's.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> reverse_kl(logits, logits).tolist()
    [0.0]
    """
    q, p = merged.float().log_softmax(-1), own.float().log_softmax(-1)
    kl: Tensor = torch.linalg.vecdot(q.exp(), q - p)
    return kl
