"""Fidelity of text models: next-token distributions at every position of a text, compared while they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter
from plait.base import backbone_of
from plait.evaluation.fleet import Candidate, stack
from plait.fidelity.measure import Closeness, TaskFidelity, task_fidelity
from plait.fidelity.panel import Panel, Part
from plait.fidelity.texts import Texts
from plait.tasks import collate, length_order, to_device
from plait.training.stacked import StackedFactors, common_shapes, stacked_updates

Worn = tuple[Adapter | None, float]
_BARE: Worn = (None, 1.0)
# Logits a pass may hold, in entries: 2 GiB of float32 on a GPU, 256 MiB on a CPU.
_ROOM = {"cuda": 1 << 29, "cpu": 1 << 26}
_IGNORED = -100
# Tokens of decoder input taken from the text itself, where a text has no second part to be written.
_DECODED = 32


def encoded(panel: Panel, kind: str, texts: Texts) -> list[dict[str, Any]]:
    """Rows of token ids: a causal model's text whole; for seq2seq the first part, and `labels` of what is written.

    What a sequence-to-sequence model writes is the second part of a pair; of a single text it is given its own beginning.
    """
    tokenizer, length = panel.tokenizer, panel.max_length
    rows = []
    for text in texts:
        if kind == "causal":
            ids = tokenizer("\n".join(text), truncation=True, max_length=length)["input_ids"]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        else:
            source = tokenizer(text[0], truncation=True, max_length=length)
            target = tokenizer(text_target=text[-1], truncation=True, max_length=length if len(text) > 1 else _DECODED)
            rows.append({k: source[k] for k in ("input_ids", "attention_mask")} | {"labels": target["input_ids"]})
    return rows


def text_closeness(panel: Panel, part: Part, merges: Sequence[Worn]) -> list[TaskFidelity]:
    """KL and agreement of each merge with the part's adapter on the part's own texts."""
    rows = encoded(panel, part.task.kind, panel.texts[part.name])
    (base, *found), n = compared(panel, part, rows, (part.adapter, 1.0), [_BARE, *merges])
    return [task_fidelity(part.name, c, base, n) for c in found]


def text_general(panel: Panel, merges: Sequence[Worn]) -> npt.NDArray[np.float64]:
    """KL(base || merged) a position on the general texts."""
    part = panel.parts[0]
    rows = encoded(panel, part.task.kind, panel.general)
    return np.array([c.kl for c in compared(panel, part, rows, _BARE, merges)[0]])


@torch.no_grad()
def compared(
    panel: Panel, part: Part, rows: Sequence[dict[str, Any]], reference: Worn, merges: Sequence[Worn]
) -> tuple[list[Closeness], int]:
    """Mean KL(reference || merge) and top-1 agreement over all positions, for each merge; and the number of positions.

    Cost: one pass of the base on (merges + 1) x rows; logits are compared batch by batch and not kept, only how often each
    token was the likeliest.
    """
    model = panel.model(part)
    named = {id(a): on_model(model, a) for a, _ in (reference, *merges) if a is not None}
    found: list[Closeness] = []
    n = 0
    for group in _groups(panel, model, merges):
        worn = [
            Candidate({}, named[id(a)] if a is not None else None, s)
            for a, s in (reference, *(merges[i] for i in group))
        ]
        sums, updates = [_Sums() for _ in group], stacks(model, worn)
        n, own_tops = 0, 0
        for batch in _batches(panel, rows, len(worn)):
            with stacked_updates(model, updates):
                logits, mask = positions(model, part.task.kind, batch, len(worn), panel.positions)
            own = _log_softmax(logits[0][mask])
            top = own.argmax(-1)
            n += len(top)
            own_tops = own_tops + torch.bincount(top, minlength=own.shape[-1])
            for mine, other in zip(sums, logits[1:], strict=True):
                mine.add(own, top, _log_softmax(other[mask]))
        found += [s.closeness(own_tops, n) for s in sums]
    return found, n


@dataclass(slots=True)
class _Sums:
    """What is summed over positions of one merge beside an adapter, whose likeliest tokens are `top`."""

    kl: float = 0.0
    agree: float = 0.0
    given: float = 0.0
    tops: Tensor | int = 0
    probabilities: Tensor | int = 0

    def add(self, own: Tensor, top: Tensor, other: Tensor) -> None:
        """Log probabilities (positions, vocabulary) of both."""
        theirs, given = other.argmax(-1), other.exp()
        self.kl += float((own.exp() * (own - other)).sum(dtype=torch.float64))
        self.agree += float((theirs == top).sum())
        self.given += float(given.gather(1, top[:, None]).sum(dtype=torch.float64))
        self.tops = self.tops + torch.bincount(theirs, minlength=own.shape[-1])
        self.probabilities = self.probabilities + given.sum(0, dtype=torch.float64)

    def closeness(self, own_tops: Tensor | int, n: int) -> Closeness:
        """Means over n positions."""
        chances = (
            float((own_tops * x).sum()) if isinstance(x, Tensor) else 0.0 for x in (self.tops, self.probabilities)
        )
        by_top, by_probability = (c / max(n, 1) ** 2 for c in chances)
        return Closeness(self.kl / max(n, 1), self.agree / max(n, 1), by_top, self.given / max(n, 1), by_probability)


def on_model(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with its modules named as in the whole model."""
    prefix = backbone_of(model)[1]
    known = dict(model.named_modules())
    names = {m: m if m in known else f"{prefix}.{m}" for m in adapter.modules}
    return replace(adapter, modules={names[m]: f for m, f in adapter.modules.items()})


def stacks(model: nn.Module, worn: Sequence[Candidate]) -> dict[str, StackedFactors]:
    """Every module's factors of all that are worn."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    shapes = common_shapes([c.adapter for c in worn if c.adapter is not None], model)
    return {name: stack(name, shape, worn, like) for name, shape in shapes.items()}


def positions(
    model: Any, kind: str, batch: Mapping[str, Tensor], members: int, which: str = "all"
) -> tuple[Tensor, Tensor]:
    """Logits (members, b, positions, vocabulary) of a batch that every member reads, and (b, positions) which count."""
    inputs = {k: v.repeat(members, 1) for k, v in batch.items() if k != "labels"}
    mask = batch["attention_mask"].bool()
    if kind == "seq2seq":
        labels = batch["labels"].repeat(members, 1)
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        mask = batch["labels"] != _IGNORED
    if which == "end":
        mask = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    logits = model(**inputs, use_cache=False).logits
    return logits.view(members, -1, *logits.shape[1:]), mask


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _groups(panel: Panel, model: Any, merges: Sequence[Worn]) -> Iterator[list[int]]:
    """Places of merges that go through the base together: as many as leave room for logits of one long row each."""
    room = _ROOM.get(panel.base.torch_device.type, _ROOM["cpu"])
    size = max(1, min(16, room // (panel.max_length * model.config.vocab_size) - 1))
    return (list(range(i, min(i + size, len(merges)))) for i in range(0, len(merges), size))


def _batches(panel: Panel, rows: Sequence[dict[str, Any]], members: int) -> Iterator[dict[str, Tensor]]:
    """Rows of like length, as many as there is room for."""
    vocabulary = int(panel.evaluator.task_model(panel.parts[0].name).config.vocab_size)
    room = _ROOM.get(panel.base.torch_device.type, _ROOM["cpu"])
    order, start = length_order(rows), 0
    while start < len(order):
        length = max(len(rows[order[start]][k]) for k in ("input_ids", "labels") if k in rows[order[start]])
        stop = start + max(1, min(panel.batch_size, room // (length * members * vocabulary)))
        yield to_device(collate(panel.tokenizer, [rows[i] for i in order[start:stop]]), panel.base.torch_device)
        start = stop
