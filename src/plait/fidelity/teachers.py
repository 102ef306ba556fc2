"""The distillation loss: how far a merge is from each adapter's predictions on that adapter's own texts, a batch at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from plait.fidelity.language import encoded, positions, split_in_two, text_closeness
from plait.fidelity.measure import closeness
from plait.fidelity.panel import Panel
from plait.fidelity.score import outputs
from plait.model.attention import fused_attention
from plait.model.base import backbone_of
from plait.model.ends import Ends
from plait.model.rowbank import row_bank
from plait.model.stacked import Active, stacked_factors, stacked_updates
from plait.tasks import collate, to_device

# Makes the merge the active adapter of the model within the block.
Applying = Callable[[], AbstractContextManager[None]]
# A task whose adapter and base hardly differ must not outweigh the others.
SMALLEST_KL = 0.05


class DistillationLoss(Protocol):
    """A loss of one batch of every part's texts."""

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """The mean over parts.

        Args:
            rows: Places in each part's texts, as many for each.
            applying: Makes the merge the active adapter within the block.
        """
        ...


def loss_of(panel: Panel) -> DistillationLoss:
    """Make the loss whose targets are the adapters' own predictions."""
    return _TextLoss(panel) if panel.is_text else HeadLoss(panel)


class HeadLoss:
    """Classes and values: all parts' rows go through the backbone together, then each through its own head.

    Args:
        panel: Base, adapters and texts.
        targets: Part -> (n, classes) logits to come close to, or (n,) class ids or values (labels, for comparison); by
            default the adapters' logits.
    """

    def __init__(self, panel: Panel, targets: Mapping[str, Any] | None = None) -> None:
        self.panel, device = panel, panel.base.torch_device
        rows: list[dict[str, Any]] = []
        self.starts: list[int] = []
        self.ends: list[Ends] = []
        self.targets: list[Tensor] = []
        self.rooms: list[float] = []
        for part in panel.parts:
            encoded_rows = panel.evaluator.encoded(part.name)
            self.starts.append(len(rows))
            rows += encoded_rows
            view = copy.copy(panel.model(part))
            view._modules = dict(view._modules)
            self.ends.append(Ends(view))
            own, bare = outputs(panel, part, [(part.adapter, 1.0), (None, 1.0)])
            given = own if targets is None else targets[part.name]
            self.targets.append(torch.as_tensor(np.asarray(given), device=device))
            room = closeness(part.task.kind, own, bare).kl
            self.rooms.append(max(room, SMALLEST_KL) * (float(own.var()) if part.task.kind == "regression" else 1.0))
        self.bank = row_bank(rows, panel.tokenizer.pad_token_id, "classification", device)
        self.heads = [{k: v.to(device, panel.base.torch_dtype) for k, v in p.head.items()} for p in panel.parts]

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """Mean over parts of KL(target || merged) over KL(adapter || base), or of the cross entropy with labels."""
        places = np.concatenate([np.asarray(r) + s for r, s in zip(rows, self.starts, strict=True)])
        device = self.panel.base.torch_device
        length = int(self.bank.lengths[places].max())
        inputs, _ = self.bank.take(torch.as_tensor(places, device=device), length, 1)
        backbone = self.ends[0].backbone
        arguments, options = self.ends[0].backbone_call(inputs)
        with fused_attention(backbone), applying():
            output = backbone(*arguments, **options)
        total, at = torch.zeros((), dtype=torch.float32, device=device), 0
        for i, chosen in enumerate(rows):
            span = slice(at, at + len(chosen))
            piece = type(output)(**{k: v[span] for k, v in output.items() if isinstance(v, Tensor)})
            logits = self.ends[i].logits(piece, {k: v[span] for k, v in inputs.items()}, self.heads[i])
            target = self.targets[i][torch.as_tensor(list(chosen), device=device)]
            total = total + self._loss(i, logits.float(), target)
            at += len(chosen)
        return total / len(rows)

    def _loss(self, i: int, logits: Tensor, target: Tensor) -> Tensor:
        if self.panel.parts[i].task.kind == "regression":
            return 0.5 * functional.mse_loss(logits.flatten(), target.float().flatten()) / self.rooms[i]
        if target.ndim == 1:
            return functional.cross_entropy(logits, target.long())
        wanted = target.float().log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True) / self.rooms[i]


class _TextLoss:
    """Next tokens: the adapters themselves are asked, batch by batch; their distributions would not fit in memory."""

    def __init__(self, panel: Panel) -> None:
        self.panel, self.model = panel, panel.model(panel.parts[0])
        self.kind = panel.parts[0].task.kind
        self.rows = [encoded(panel, self.kind, panel.texts[p.name]) for p in panel.parts]
        active: list[Active] = [(p.adapter, 1.0) for p in panel.parts]
        self.teachers = [stacked_factors(self.model, active, whole=True)]
        inside = f"{backbone_of(self.model)[1]}."
        if split_in_two(self.model, self.kind) and not all(m.startswith(inside) for m in self.teachers[0]):
            # The output layer sees rows of unlike numbers of positions: each adapter is asked alone.
            self.teachers = [stacked_factors(self.model, [one], whole=True) for one in active]
        self.rooms = [max(text_closeness(panel, p, [(None, 1.0)])[0].kl_base, SMALLEST_KL) for p in panel.parts]

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """Mean over parts of KL(adapter || merged) a position, over KL(adapter || base)."""
        chosen = [r[i] for r, places in zip(self.rows, rows, strict=True) for i in places]
        batch = to_device(collate(self.panel.tokenizer, chosen), self.panel.base.torch_device)
        with fused_attention(self.model):
            with applying():
                logits, mask = positions(self.model, self.kind, batch, 1, self.panel.positions)
            wanted = self._wanted(batch)
        counts = mask.sum(1).view(len(rows), -1).sum(1).tolist()
        total = logits.new_zeros((), dtype=torch.float32)
        for room, logs, target in zip(
            self.rooms, torch.split(logits[0], counts), torch.split(wanted, counts), strict=True
        ):
            logs, target = (x.float().log_softmax(-1) for x in (logs, target))
            total = total + functional.kl_div(logs, target, reduction="batchmean", log_target=True) / room
        return total / len(rows)

    @torch.no_grad()
    def _wanted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The adapters' logits (counted, vocabulary), each of its own rows."""
        each, logits = len(batch["input_ids"]) // len(self.teachers), []
        for i, teachers in enumerate(self.teachers):
            part = {k: v[i * each : (i + 1) * each] for k, v in batch.items()}
            with stacked_updates(self.model, teachers):
                logits.append(positions(self.model, self.kind, part, 1, self.panel.positions)[0][0])
        return torch.cat(logits)
