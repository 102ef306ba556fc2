"""The distillation loss of text: next-token distributions and layers of every adapter on its own texts, computed once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.fidelity.language import positions, text_batches
from plait.fidelity.panel import Panel, Part
from plait.fidelity.tokens import rows_of
from plait.learning.layers import LayerCollector, LayerTargets, layers_to_keep, watched
from plait.learning.passes import by_part, passes_of
from plait.learning.targets import TopTargets, joined
from plait.learning.teachers import SMALLEST_KL, Applying
from plait.model.applied import applied
from plait.model.attention import fused_attention
from plait.tasks import collate, to_device


@dataclass(frozen=True, slots=True)
class _Taught:
    """What one adapter says on its texts: next tokens at all positions that count, and where each text's begin."""

    tokens: TopTargets
    starts: Sequence[int]
    room: float
    layers: LayerTargets | None

    def of(self, rows: Sequence[int]) -> TopTargets:
        """Next tokens of some texts, one below the other."""
        device = self.tokens.rest.device
        return self.tokens.take(
            torch.cat([torch.arange(self.starts[i], self.starts[i + 1], device=device) for i in rows])
        )

    def count(self, rows: Sequence[int]) -> int:
        """Count the positions of some texts."""
        return sum(self.starts[i + 1] - self.starts[i] for i in rows)


class TextLoss:
    """Next tokens: KL(adapter || merged) a position, over KL(adapter || base).

    Distributions over a vocabulary would not fit in memory: of each the likeliest tokens are kept, and the mass of the others
    (`TopTargets`).

    Args:
        panel: Base, adapters and texts.
        layers: Weight of the distance of the layers' outputs beside the next tokens'; 0 to leave them out.
    """

    def __init__(self, panel: Panel, layers: float = 0.0) -> None:
        self.panel, self.model = panel, panel.model(panel.parts[0])
        self.kind, self.weight = panel.parts[0].task.kind, layers
        self.rows = [rows_of(panel, p) for p in panel.parts]
        self._positions = sum(
            len(r["labels"] if self.kind == "seq2seq" else r["input_ids"]) for own in self.rows for r in own
        )
        self.taught = [self._asked(part, i) for i, part in enumerate(panel.parts)]

    def prepare(self, coming: Sequence[Sequence[Sequence[int]]], applying: Applying) -> None:
        """Do nothing: all targets are known."""

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """Mean over parts, of one batch of every part's texts."""
        device = self.panel.base.torch_device
        keys = [(i, n) for i, places in enumerate(rows) for n in places]
        counts = [one.count(places) for one, places in zip(self.taught, rows, strict=True)]
        total = torch.zeros((), dtype=torch.float32, device=device)
        step = [self.rows[i][n] for i, n in keys]
        for some in passes_of([self._size(row) for row in step], device.type):
            batch = to_device(collate(self.panel.tokenizer, [step[p] for p in some]), device)
            with fused_attention(self.model), applying(), watched(self.model) as states:
                logits, mask = positions(self.model, self.kind, batch, 1, self.panel.positions)
            shares = list(by_part(keys, some))
            pieces = torch.split(logits[0], [self.taught[i].count(places) for i, _, places in shares])
            for (i, span, places), piece in zip(shares, pieces, strict=True):
                if not len(piece):  # prompts that nothing was written after
                    continue
                one = self.taught[i]
                total = total + one.of(places).kl(piece).sum() / (counts[i] * one.room)
                if one.layers is not None:
                    near = one.layers.loss(places, [h[span] for h in states], mask[span])
                    total = total + self.weight * near * (len(piece) / counts[i])
        return total / len(rows)

    def _size(self, row: Mapping[str, Any]) -> int:
        """Count what a text makes the model read, and an encoder-decoder write."""
        return len(row["input_ids"]) + (len(row["labels"]) if self.kind == "seq2seq" else 0)

    @torch.no_grad()
    def _asked(self, part: Part, place: int) -> _Taught:
        """Ask the adapter, and the bare base for its distance, about all of the part's texts."""
        rows, room, count = self.rows[place], 0.0, 0
        found: list[TopTargets] = [TopTargets(*[torch.empty(0, dtype=torch.float32)] * 3)] * len(rows)
        collector: LayerCollector | None = None
        for chosen, batch in text_batches(self.panel, rows, 1):
            logits, states, mask = self._passed(batch, part.adapter)
            targets, counts = TopTargets.of(logits), mask.sum(1).tolist()
            for i, start, n in zip(chosen, _starts(counts), counts, strict=False):
                found[i] = targets.take(torch.arange(start, start + n, device=logits.device))
            bare, base_states, _ = self._passed(batch, None)
            room, count = room + float(targets.kl(bare).sum(dtype=torch.float64)), count + len(logits)
            layers = layers_to_keep(states, self._positions) if self.weight else []
            if layers:
                collector = collector or LayerCollector(layers, len(rows))
                collector.add(chosen, states, base_states, mask)
        starts = _starts([len(f.rest) for f in found])
        return _Taught(
            joined(found), starts, max(room / max(1, count), SMALLEST_KL), collector.targets if collector else None
        )

    def _passed(self, batch: Mapping[str, Tensor], active: Adapter | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits at the positions that count, what the layers put out, and which positions those are."""
        with fused_attention(self.model), applied(self.model, active), watched(self.model) as states:
            logits, mask = positions(self.model, self.kind, batch, 1, self.panel.positions)
        return logits[0], states, mask


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each of some lists begins that stand one after another, and where the last one ends."""
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    return starts
