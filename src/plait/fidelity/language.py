"""Fidelity of text models: next-token distributions at every position of a text, compared while they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from plait.evaluation.answer_tree import shared_ends
from plait.fidelity.measure import Closeness, TaskFidelity, task_fidelity
from plait.fidelity.panel import WRITTEN, Panel, Part
from plait.fidelity.tokens import encoded, rows_of
from plait.model.attention import fused_attention
from plait.model.base import backbone_of
from plait.model.decoders import decoder_inputs
from plait.model.stacked import Active, by_member, stacked_factors, stacked_updates
from plait.tasks import collate, length_order, require_positions, to_device
from plait.tasks.task import IGNORED

_BARE: Active = (None, 1.0)
# Logits a pass may hold, in entries: 2 GiB of float32 on a GPU, 256 MiB on a CPU.
MAX_LOGITS = {"cuda": 1 << 29, "cpu": 1 << 26}


def text_closeness(panel: Panel, part: Part, merges: Sequence[Active]) -> list[TaskFidelity]:
    """KL and agreement of each merge with the part's adapter on the part's own texts."""
    rows = rows_of(panel, part)
    (base, *merged), n = compared(panel, part, rows, (part.adapter, 1.0), [_BARE, *merges])
    return [task_fidelity(part.name, c, base, n) for c in merged]


def text_general(panel: Panel, merges: Sequence[Active]) -> npt.NDArray[np.float64]:
    """KL(base || merged) a position on the general texts."""
    part = panel.parts[0]
    rows = encoded(panel, part.task.kind, panel.general)
    return np.array([c.kl for c in compared(panel, part, rows, _BARE, merges)[0]])


@torch.no_grad()
def compared(
    panel: Panel, part: Part, rows: Sequence[dict[str, Any]], reference: Active, merges: Sequence[Active]
) -> tuple[list[Closeness], int]:
    """Mean KL(reference || merge) and top-1 agreement over all positions, for each merge; and the number of positions.

    Cost: one pass of the base on (merges + 1) x rows; logits are compared batch by batch and not kept, only how often each
    token was the likeliest.
    """
    model = panel.model(part)
    require_positions(model, (len(r["input_ids"]) for r in rows), f"task {part.name}")
    results: list[Closeness] = []
    n = 0
    for group in _groups(panel, model, merges):
        active = [reference, *(merges[i] for i in group)]
        sums, updates = [Sums() for _ in group], stacked_factors(model, active, whole=True)
        n = 0
        own_tops: Tensor | int = 0
        for _, batch in text_batches(panel, rows, len(active)):
            with fused_attention(model), stacked_updates(model, updates):
                logits, mask = positions(model, part.task.kind, batch, len(active), panel.positions)
            own = Own.of(log_probabilities(logits[0]))
            n += len(own.top)
            own_tops = own_tops + torch.bincount(own.top, minlength=logits.shape[-1])
            answers = mask.sum(1).tolist() if panel.positions == WRITTEN and "labels" in batch else ()
            for mine, other in zip(sums, logits[1:], strict=True):
                mine.add(own, log_probabilities(other), answers)
        results += [s.closeness(own_tops, n, len(rows)) for s in sums]
    return results, n


@dataclass(frozen=True, slots=True)
class Own:
    """An adapter's log probabilities (positions, vocabulary), its probabilities and its likeliest tokens."""

    logs: Tensor
    probabilities: Tensor
    top: Tensor

    @classmethod
    def of(cls, logs: Tensor) -> Own:
        """Take them from the log probabilities."""
        return cls(logs, logs.exp(), logs.argmax(-1))


@dataclass(slots=True)
class Sums:
    """What is summed over positions of one merge beside an adapter; tensors, so that nobody waits for the device."""

    kl: Tensor | float = 0.0
    agree: Tensor | float = 0.0
    given: Tensor | float = 0.0
    capped: Tensor | float = 0.0
    tops: Tensor | int = 0
    probabilities: Tensor | int = 0
    verbatim: Tensor | None = None

    def add(self, own: Own, other: Tensor, answers: Sequence[int] = ()) -> None:
        """Log probabilities (positions, vocabulary) of the merge; of written answers, the positions of each."""
        theirs = other.argmax(-1)
        if answers:
            whole = torch.stack([part.all() for part in torch.split(theirs == own.top, list(answers))]).sum()
            self.verbatim = whole if self.verbatim is None else self.verbatim + whole
        # A dot product a position: summing a matrix in float64 would first copy it.
        self.kl = self.kl + torch.linalg.vecdot(own.probabilities, own.logs - other).sum(dtype=torch.float64)
        self.agree = self.agree + (theirs == own.top).sum(dtype=torch.float64)
        self.tops = self.tops + torch.bincount(theirs, minlength=other.shape[-1])
        given = other.exp_()
        chosen = given.gather(1, own.top[:, None])
        self.given = self.given + chosen.sum(dtype=torch.float64)
        most = own.probabilities.gather(1, own.top[:, None])
        self.capped = self.capped + torch.minimum(chosen, most).sum(dtype=torch.float64)
        self.probabilities = self.probabilities + given.sum(0).double()

    def closeness(self, own_tops: Tensor | int, n: int, texts: int = 1) -> Closeness:
        """Means over n positions, and over texts."""
        kl, agree, given, capped = (float(x) / max(n, 1) for x in (self.kl, self.agree, self.given, self.capped))
        chances = (
            float((own_tops * x).sum()) if isinstance(x, Tensor) else 0.0 for x in (self.tops, self.probabilities)
        )
        by_top, by_probability = (c / max(n, 1) ** 2 for c in chances)
        verbatim = None if self.verbatim is None else float(self.verbatim) / texts
        return Closeness(kl, agree, by_top, given, by_probability, verbatim, capped)


def positions(
    model: Any, kind: str, batch: Mapping[str, Tensor], members: int, which: str = "all"
) -> tuple[Tensor, Tensor]:
    """Logits of a batch that every member reads, at the positions that count.

    Args:
        model: The model, the members' updates on it.
        kind: "causal" or "seq2seq".
        batch: (b, ...) tensors.
        members: How many read it.
        which: "all" positions, the "end" of each row, or those at which a token of `labels` was "written" (all of a row that
            has none).

    Returns:
        (members, counted, vocabulary) logits, row by row, and (b, length) which positions count.

    Cost: a causal model's output layer, a fifth of the work of a small model and most of its memory, runs only where
    positions count.
    """
    inputs = {k: v.repeat(members, 1) for k, v in batch.items() if k != "labels"}
    mask = batch["attention_mask"].bool()
    if kind == "seq2seq":
        labels = batch["labels"].repeat(members, 1)
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
        mask = batch["labels"] != IGNORED
    if which == "end":
        mask = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    if which == WRITTEN and kind == "causal" and "labels" in batch:
        mask = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    if not split_in_two(model, kind):
        return by_member(model(**inputs, use_cache=False).logits, members)[:, mask], mask
    with shared_ends(model) as ends:
        arguments, options = ends.backbone_call(inputs)
        output = ends.backbone(*arguments, **options)
        picked = by_member(output.last_hidden_state, members)[:, mask]
        logits = ends.logits(type(output)(last_hidden_state=picked), {"input_ids": inputs["input_ids"][:1]})
    return logits, mask


def split_in_two(model: Any, kind: str) -> bool:
    """Whether the output layer can be asked about chosen positions: those of causal models look at one at a time."""
    return kind == "causal" and bool(backbone_of(model)[1])


def log_probabilities(logits: Tensor) -> Tensor:
    """Normalise logits, in float32."""
    return logits.float().log_softmax(-1)


def _groups(panel: Panel, model: Any, merges: Sequence[Active]) -> Iterator[list[int]]:
    """Places of merges that go through the base together: as many as leave room for logits of one long row each."""
    room = MAX_LOGITS.get(panel.base.torch_device.type, MAX_LOGITS["cpu"])
    size = max(1, min(16, room // (panel.max_length * model.config.vocab_size) - 1))
    return (list(range(i, min(i + size, len(merges)))) for i in range(0, len(merges), size))


def text_batches(
    panel: Panel, rows: Sequence[dict[str, Any]], members: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of like length, as many as there is room for, with their places; longest first."""
    vocabulary = int(panel.evaluator.task_model(panel.parts[0].name).config.vocab_size)
    room = MAX_LOGITS.get(panel.base.torch_device.type, MAX_LOGITS["cpu"])
    order, start = length_order(rows), 0
    while start < len(order):
        length = max(len(rows[order[start]][k]) for k in ("input_ids", "labels") if k in rows[order[start]])
        stop = start + max(1, min(panel.batch_size, room // (length * members * vocabulary)))
        batch = to_device(collate(panel.tokenizer, [rows[i] for i in order[start:stop]]), panel.base.torch_device)
        yield list(order[start:stop]), batch
        start = stop
