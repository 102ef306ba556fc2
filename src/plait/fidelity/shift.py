"""Hidden states: how far a merge moves every layer away from where an adapter has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.fidelity.panel import Panel, Part
from plait.fidelity.tokens import rows_of
from plait.model.applied import applied
from plait.tasks import batches, to_device


@torch.no_grad()
def hidden_shift(panel: Panel, part: Part, merge: Adapter | None) -> tuple[float, ...]:
    """|h_merged - h_adapter| / |h_base - h_adapter| after every layer, over the real tokens of the part's texts.

    Args:
        panel: Base, adapters and texts.
        part: Part whose texts are read.
        merge: What stands in the adapter's place.

    Returns:
        One number a layer (the decoder's after the encoder's, where there are two): 0 for the adapter itself, 1 for the
        bare base; 0 where the adapter has not yet moved anything, and nothing can be measured by that.

    Cost: three passes over the texts.
    """
    model = panel.model(part)
    off: list[Tensor] = []
    room: list[Tensor] = []
    for batch in batches(panel.tokenizer, rows_of(panel, part), panel.batch_size, by_length=True):
        inputs = to_device(
            {k: v for k, v in batch.items() if k != "labels" or part.task.kind == "seq2seq"}, panel.base.torch_device
        )
        states = []
        for active in (part.adapter, None, merge):
            with applied(model, active):
                states.append(list(_states(model(**inputs, output_hidden_states=True), inputs)))
        own, bare, merged = states
        off.append(torch.stack([(a - b).double().square().sum() for a, b in zip(own, merged, strict=True)]))
        room.append(torch.stack([(a - b).double().square().sum() for a, b in zip(own, bare, strict=True)]))
    apart, moved = torch.stack(off).sum(0), torch.stack(room).sum(0)
    ratio = torch.where(moved > 0, apart / moved.clamp_min(torch.finfo(moved.dtype).tiny), 0.0)
    return tuple(ratio.sqrt().tolist())


def _states(output: Any, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Hidden states after each layer, (tokens, width): the embeddings, which no layer has moved, are left out."""
    mask = inputs["attention_mask"].bool()
    for key in ("hidden_states", "encoder_hidden_states"):
        yield from (h[mask].float() for h in (getattr(output, key, None) or ())[1:])
    for h in (getattr(output, "decoder_hidden_states", None) or ())[1:]:
        yield h.float().flatten(0, 1)
