"""Heads that follow a merge: the last layer of each classifier fitted again, in closed form, to its adapter's own answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.adapters.lora import Adapter
from plait.adapters.one_thread import in_one_thread
from plait.fidelity.measure import closeness
from plait.fidelity.panel import Panel, Part
from plait.fidelity.record import HeadRefit
from plait.fidelity.score import outputs
from plait.fidelity.texts import FEWEST, HELD_OUT
from plait.model.applied import applied
from plait.model.base import head_modules, load_head
from plait.model.hooks import hooked
from plait.tasks import batches, length_order, to_device

# How strongly a head is held where it was, in units of the features' mean energy.
STRENGTHS = (0.1, 1.0, 10.0)


@dataclass(frozen=True, slots=True)
class Last:
    """The last layer of a head, what it reads of each text in the merged model, and what it should put out.

    Args:
        name: Name in the task's model.
        weights: (classes, d + 1), the bias last, float64; (classes, d) without one.
        features: (n, d + 1), the last column 1; (n, d) without a bias.
        wanted: (n, classes), the adapter's own outputs.
    """

    name: str
    weights: Float[Tensor, "c d"]
    features: Float[Tensor, "n d"]
    wanted: Float[Tensor, "n c"]

    def refit(self, strength: float, rows: Int[Tensor, " m"]) -> Float[Tensor, "c d"]:
        """Minimise |V z - wanted|^2 over some rows, plus what V moves: V + R^T (Z Z^T + k I)^-1 Z."""
        Z = self.features[rows]
        gram = Z @ Z.T
        level = strength * float(gram.trace()) / Z.shape[1]
        rest = self.wanted[rows] - Z @ self.weights.T
        moved: Tensor = in_one_thread(torch.linalg.solve, gram + level * torch.eye(len(Z), dtype=Z.dtype), Z)
        return self.weights + rest.T @ moved

    def loss(self, kind: str, weights: Float[Tensor, "c d"], rows: Int[Tensor, " m"]) -> float:
        """KL from the adapter's answers on some rows."""
        return closeness(kind, self.wanted[rows].numpy(), (self.features[rows] @ weights.T).numpy()).kl


def with_heads(panel: Panel, merge: Adapter) -> tuple[Adapter, tuple[HeadRefit, ...]]:
    """Let the heads follow a merge, where there are heads and texts enough to hold some out; else change nothing."""
    if panel.is_text or min(map(len, panel.texts.values())) < FEWEST:
        return merge, ()
    return refit_heads(panel.with_texts(panel.texts, general=False), merge)


def refit_heads(panel: Panel, merge: Adapter) -> tuple[Adapter, tuple[HeadRefit, ...]]:
    """Fit the last layer of every head to the merged model's features, where that is closer on the texts held out.

    A head was trained for features that the merge has changed. Its last layer V is linear in them: on the texts that are
    learnt from, the V nearest to the adapter's own outputs, held where it was by a ridge. Three strengths are tried; the best
    on the texts held out is fitted again to all of them, and where none is closer than the head as it is, that stays.

    Args:
        panel: Base, adapters with heads, and texts.
        merge: The merge; all weights but those of the heads stay.

    Returns:
        The merge with its heads, and for each what that did on the texts held out.

    Cost: a pass over all texts with the merge and one with each adapter; a system of (texts, texts) each.
    Source: Yang et al., ICML 2024 (arXiv:2402.02705), in linear form and in the head itself, so that nothing is added.
    """
    heads = {task: dict(head) for task, head in merge.heads.items()}
    done = []
    for part in panel.parts:
        last = _last_layer(panel, part, merge)
        if last is None:
            continue
        kind = part.task.kind
        places = torch.arange(len(last.features))
        out = places[HELD_OUT - 1 :: HELD_OUT]
        most = places[places % HELD_OUT != HELD_OUT - 1]
        before = last.loss(kind, last.weights, out)
        losses = [last.loss(kind, last.refit(k, most), out) for k in STRENGTHS]
        best = int(np.argmin(losses))
        kept = losses[best] < before
        done.append(HeadRefit(part.name, before, losses[best], kept, STRENGTHS[best]))
        if kept:
            heads[part.name] = _with_last(part, last.name, last.refit(STRENGTHS[best], places))
    return replace(merge, heads=heads), tuple(done)


def _with_last(part: Part, name: str, weights: Float[Tensor, "c d"]) -> dict[str, Tensor]:
    """The part's head with another last layer, in its own types."""
    head = dict(part.head)
    W, bias = head[f"{name}.weight"], head.get(f"{name}.bias")
    head[f"{name}.weight"] = torch.empty_like(W).copy_(weights[:, : W.shape[1]])
    if bias is not None:
        head[f"{name}.bias"] = torch.empty_like(bias).copy_(weights[:, -1])
    return head


def _last_layer(panel: Panel, part: Part, merge: Adapter) -> Last | None:
    """None where the head ends in no linear layer that puts out its answers."""
    model = panel.model(part)
    load_head(model, part.head)
    answers = min(t.shape[0] for t in part.head.values() if t.ndim == 2)
    inside = [
        (f"{top}.{name}".removesuffix("."), module)
        for top in head_modules(model)
        for name, module in model.get_submodule(top).named_modules()
        if isinstance(module, nn.Linear) and module.out_features == answers
    ]
    if not inside:
        return None
    name, layer = inside[-1]
    features = _read(panel, part, merge, model, layer)
    W, bias = part.head[f"{name}.weight"].double(), part.head.get(f"{name}.bias")
    if bias is not None:
        W = torch.cat([W, bias.double()[:, None]], dim=1)
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    wanted = torch.from_numpy(outputs(panel, part, [(part.adapter, 1.0)])[0]).double()
    return Last(name, W, features, wanted)


def _read(panel: Panel, part: Part, merge: Adapter, model: Any, layer: nn.Module) -> Float[Tensor, "n d"]:
    """What a layer reads of each text, in order; of a layer that answers at every position, where the answer is taken."""
    calls: list[tuple[Tensor, Tensor]] = []
    rows: list[Tensor] = []

    def note(x: Tensor, output: Tensor) -> Tensor:
        calls.append((x, output))
        return output

    texts = panel.evaluator.encoded(part.name)
    with torch.no_grad(), applied(model, merge), hooked([(layer, note)]):
        for batch in batches(panel.tokenizer, texts, panel.batch_size, by_length=True):
            given = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**to_device(given, panel.base.torch_device)).logits
            rows.append(_at_answers(*calls.pop(), logits))
    return torch.cat(rows)[torch.tensor(length_order(texts), dtype=torch.int64).argsort()]


def _at_answers(x: Tensor, output: Tensor, logits: Tensor) -> Float[Tensor, "n d"]:
    if x.ndim == 3:
        at = (output - logits[:, None]).abs().amax(-1).argmin(1)
        x = x[torch.arange(len(x), device=x.device), at]
    return x.double().cpu()
