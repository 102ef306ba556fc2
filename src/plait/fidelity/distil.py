"""Distilling adapters into their merge on their own texts: weights per adapter and module, or the merge's factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LINEAR, Adapter, LoraFactors
from plait.errors import RunError
from plait.fidelity.panel import Panel
from plait.fidelity.teachers import DistillationLoss, loss_of
from plait.model.applied import resolve
from plait.model.hooks import hooked

Learns = Literal["weights", "factors"]
# Learning rates of Adam at the first step; they fall linearly to zero. Weights start at 1, factors where the merge left them.
RATES: Mapping[str, float] = {"weights": 2e-2, "factors": 1e-3}


@dataclass(frozen=True, slots=True)
class Distilled:
    """What distilling gave.

    Args:
        adapter: The merge after it.
        first_loss, last_loss: Mean over the first and last tenth of the steps: over adapters, KL(adapter || merged) over
            KL(adapter || base).
        weights: Module -> one number per group of ranks that was learnt; {} where factors were.
    """

    adapter: Adapter
    first_loss: float
    last_loss: float
    weights: Mapping[str, tuple[float, ...]]


def distil(
    panel: Panel,
    merge: Adapter,
    *,
    learns: Learns,
    groups: Mapping[str, Sequence[int]] | None = None,
    steps: int = 100,
    batch: int = 8,
    rate: float | None = None,
    seed: int = 0,
    loss: DistillationLoss | None = None,
) -> Distilled:
    """Move a merge towards every adapter's predictions on that adapter's own texts; no labels.

    Args:
        panel: Base, adapters and texts.
        merge: Where to start, its scale folded in.
        learns: "weights": one number per group of ranks and module multiplies the merge's parts, so nothing new can be
            learnt; "factors": A and B themselves move (AdamW without decay).
        groups: Module -> sizes of the groups of its ranks, such as one per adapter; by default one group a module.
        steps: How many, each of one batch of every adapter's texts.
        batch: Texts of each adapter in a step.
        rate: Rate of Adam at the start; see `RATES`.
        seed: Seed of the order of the texts.
        loss: What is made small; by default the distance from the adapters' predictions.

    Raises:
        RunError: A loss that is not finite.

    Cost: `steps` forward and backward passes of the base on adapters x batch texts, and a forward pass more for text.
    """
    generator = torch.Generator().manual_seed(seed)
    device = panel.base.torch_device
    students = {
        m: _Student.of(f, learns, (groups or {}).get(m), device) for m, f in merge.modules.items() if f.kind == LINEAR
    }
    parameters = [p for student in students.values() for p in student.parameters]
    optimiser = torch.optim.AdamW(parameters, lr=rate or RATES[learns], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / max(1, steps))
    model = panel.model(panel.parts[0])
    changes = [(resolve(model, m, merge.prefix), student.change) for m, student in students.items()]
    loss = loss or loss_of(panel)
    losses: list[Tensor] = []
    orders = [_endless(len(panel.texts[p.name]), batch, generator) for p in panel.parts]
    frozen = _frozen(model)
    for _ in range(steps):
        value = loss([next(o) for o in orders], lambda: hooked(changes))
        optimiser.zero_grad()
        value.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(value.detach())
    _thaw(frozen)
    seen = torch.stack(losses).float().cpu().tolist() if losses else []
    if not all(map(math.isfinite, seen)):
        raise RunError("the distillation's loss is not finite", hint="a smaller rate, or float32")
    few = max(1, len(seen) // 10)
    changed = {m: students[m].factors() if m in students else f for m, f in merge.modules.items()}
    weights = {m: p.learnt() for m, p in students.items()} if learns == "weights" else {}
    first, last = (float(np.mean(part)) if part else float("nan") for part in (seen[:few], seen[-few:]))
    return Distilled(replace(merge, modules=changed), first, last, weights)


@dataclass(frozen=True, slots=True)
class _Student:
    """One module's factors while they learn: B (w * A x), float32."""

    A: Tensor
    B: Tensor
    w: Tensor
    owner: Tensor
    parameters: tuple[Tensor, ...]

    @classmethod
    def of(cls, f: LoraFactors, learns: str, groups: Sequence[int] | None, device: torch.device) -> _Student:
        folded = f.folded(device=device)
        # Copies: the merge itself must not move.
        A, B = folded.A.clone(), folded.B.clone()
        sizes = list(groups or [f.rank])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)).to(device)
        w = torch.ones(len(sizes), dtype=A.dtype, device=device)
        parameters = (w,) if learns == "weights" else (A, B)
        for p in parameters:
            p.requires_grad_(True)
        return cls(A, B, w, owner, parameters)

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the update to the module's output."""
        scaled = (x @ self.A.to(x.dtype).T) * self.w[self.owner].to(x.dtype)
        return output + scaled @ self.B.to(x.dtype).T

    def factors(self) -> LoraFactors:
        """Give the factors as they are now."""
        return LoraFactors(self.A.detach().cpu(), (self.B * self.w[self.owner]).detach().cpu())

    def learnt(self) -> tuple[float, ...]:
        """Give the weights as they are now."""
        return tuple(self.w.detach().cpu().tolist())


def _endless(rows: int, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Places of the next texts, each once before any twice; always `batch` of them."""
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:batch]
        waiting = waiting[batch:]


def _frozen(model: Any) -> list[Tensor]:
    """The model's parameters that asked for gradients: only the students' are wanted."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    return parameters


def _thaw(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.requires_grad_(True)
