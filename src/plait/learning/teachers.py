"""The distillation loss: how far a merge is from what each adapter does on its own texts, relative to the bare base's distance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from plait.fidelity.measure import closeness
from plait.fidelity.panel import Panel, Part
from plait.fidelity.score import outputs
from plait.learning.layers import LayerCollector, LayerTargets, layers_to_keep, watched
from plait.learning.passes import by_part, passes_of
from plait.model.applied import applied
from plait.model.attention import fused_attention
from plait.model.ends import Ends
from plait.model.rowbank import row_bank

# Makes the merge the active adapter of the model within the block.
Applying = Callable[[], AbstractContextManager[None]]
# A task whose adapter and base hardly differ must not outweigh the others.
SMALLEST_KL = 0.05


class DistillationLoss(Protocol):
    """A loss of one batch of every part's texts."""

    def prepare(self, coming: Sequence[Sequence[Sequence[int]]], applying: Applying) -> None:
        """Do what has to be done before the next steps.

        Args:
            coming: The texts of each of them: places in each part's texts.
            applying: Makes the merge, as it is now, the active adapter within the block.
        """
        ...

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """The mean over parts.

        Args:
            rows: Places in each part's texts, as many for each.
            applying: Makes the merge the active adapter within the block.
        """
        ...


class HeadLoss:
    """Classes and values: all parts' rows of like length go through the backbone together, then each through its own head.

    What the adapters answer, and what their layers put out, is computed once and kept.

    Args:
        panel: Base, adapters and texts.
        targets: Part -> (n, classes) logits to come close to, or (n,) class ids or values (labels, for comparison); by
            default the adapters' logits.
        layers: Weight of the distance of the layers' outputs beside the answers'; 0 to leave them out.
    """

    def __init__(self, panel: Panel, targets: Mapping[str, Any] | None = None, layers: float = 0.0) -> None:
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
        self.weight = layers
        self.layers = (
            [self._layers_of(part, start) for part, start in zip(panel.parts, self.starts, strict=True)]
            if layers
            else []
        )

    def prepare(self, coming: Sequence[Sequence[Sequence[int]]], applying: Applying) -> None:
        """Do nothing: all targets are known."""

    def __call__(self, rows: Sequence[Sequence[int]], applying: Applying) -> Tensor:
        """Mean over parts of KL(target || merged) over KL(adapter || base), or of the cross entropy with labels."""
        device = self.panel.base.torch_device
        keys = [(i, n) for i, chosen in enumerate(rows) for n in chosen]
        places = np.array([self.starts[i] + n for i, n in keys], np.int64)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for some in passes_of(self.bank.lengths[places].tolist(), device.type):
            with applying(), watched(self.ends[0].backbone) as states:
                output, inputs = self._run(places[some])
            for i, span, chosen in by_part(keys, some):
                piece = type(output)(**{k: v[span] for k, v in output.items() if isinstance(v, Tensor)})
                logits = self.ends[i].logits(piece, {k: v[span] for k, v in inputs.items()}, self.heads[i])
                target = self.targets[i][torch.as_tensor(chosen, device=device)]
                total = total + self._loss(i, logits.float(), target) * (len(chosen) / len(rows[i]))
                if (near := self.layers[i] if self.layers else None) is not None:
                    mask = inputs["attention_mask"][span].bool()
                    share = self._tokens(i, chosen) / self._tokens(i, rows[i])
                    total = total + self.weight * share * near.loss(chosen, [h[span] for h in states], mask)
        return total / len(rows)

    def _tokens(self, part: int, rows: Sequence[int]) -> int:
        """Count the tokens of some texts of a part."""
        return int(self.bank.lengths[[self.starts[part] + n for n in rows]].sum())

    def _run(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, Mapping[str, Tensor]]:
        """What the backbone makes of the rows at these places in the bank, and the rows."""
        length = int(self.bank.lengths[places].max())
        inputs, _ = self.bank.take(torch.as_tensor(places, device=self.panel.base.torch_device), length, 1)
        backbone = self.ends[0].backbone
        arguments, options = self.ends[0].backbone_call(inputs)
        with fused_attention(backbone):
            return backbone(*arguments, **options), inputs

    @torch.no_grad()
    def _layers_of(self, part: Part, start: int) -> LayerTargets | None:
        """Compute what the layers put out on a part's texts; None where nothing can be watched, or kept."""
        texts, size = len(self.panel.texts[part.name]), self.panel.batch_size
        collector: LayerCollector | None = None
        for at in range(0, texts, size):
            rows = range(at, min(at + size, texts))
            places = np.arange(start + rows.start, start + rows.stop)
            seen: list[list[Tensor]] = []
            for active in (part.adapter, None):
                with applied(self.panel.model(part), active), watched(self.ends[0].backbone) as states:
                    inputs = self._run(places)[1]
                seen.append(states)
            own, bare = seen
            layers = layers_to_keep(own, int(self.bank.lengths.sum()))
            if not layers:
                return None
            collector = collector or LayerCollector(layers, texts)
            collector.add(rows, own, bare, inputs["attention_mask"].bool())
        return collector.targets if collector else None

    def _loss(self, i: int, logits: Tensor, target: Tensor) -> Tensor:
        if self.panel.parts[i].task.kind == "regression":
            return 0.5 * functional.mse_loss(logits.flatten(), target.float().flatten()) / self.rooms[i]
        if target.ndim == 1:
            return functional.cross_entropy(logits, target.long())
        wanted = target.float().log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True) / self.rooms[i]
