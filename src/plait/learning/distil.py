"""Distilling adapters into their merge on their own texts: weights per adapter and module, or the merge's factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from plait.adapters.lora import LINEAR, Adapter
from plait.errors import RunError
from plait.fidelity.panel import Panel
from plait.fidelity.record import Look
from plait.learning.losses import loss_of
from plait.learning.student import Student
from plait.learning.teachers import DistillationLoss
from plait.model.applied import resolve
from plait.model.hooks import hooked

Learns = Literal["weights", "factors"]
# Steps whose texts are known in advance: a loss that has to write first writes for all of them together.
AHEAD = 8
# Rates of Adam: of weights, which start at 1; of factors, which start where the merge left them, relative to the root mean square of each.
# An absolute one fits one base: 1e-3 took merges of encoders closer and that of a 1.5 B decoder away (docs/results/text-qwen15.md).
RATES: Mapping[str, float] = {"weights": 2e-2, "factors": 3e-2}
# The part of the steps in which the rate of factors rises; after it, and for weights from the first step, it falls linearly to zero.
WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Stopping:
    """When to stop: where texts held out have not said for a while that it helps.

    Args:
        score: How close a merge is to the adapters on texts that were held out; more is better.
        every: Steps between looks; the last step is looked at too.
        patience: Looks without a better one after which it stops.
        on_look: Called after each look.
    """

    score: Callable[[Adapter], float]
    every: int = 20
    patience: int = 3
    on_look: Callable[[Look], None] = lambda _: None


class Keeping(Protocol):
    """Where learning is kept between its steps, so that it can go on from there."""

    def go_on(self, learning: Learning, loss: DistillationLoss) -> int:
        """Put both where they were after so many steps; 0 where they begin."""
        ...

    def keep(self, learning: Learning, loss: DistillationLoss, step: int) -> None:
        """Keep both as they are after a step, where no text of a later one is prepared yet."""
        ...


@dataclass(frozen=True, slots=True)
class Distilled:
    """What distilling gave.

    Args:
        adapter: The merge after it; with a `Stopping` the best one that was looked at.
        first_loss, last_loss: Mean over the first and last tenth of the steps: over adapters, KL(adapter || merged) over
            KL(adapter || base), and what the layers add.
        weights: Module -> one number per group of ranks that was learnt; {} where factors were.
        steps: Steps after which the adapter is what it is.
        looks: What was seen on the way.
    """

    adapter: Adapter
    first_loss: float
    last_loss: float
    weights: Mapping[str, tuple[float, ...]]
    steps: int = 0
    looks: tuple[Look, ...] = ()


def distil(
    panel: Panel,
    merge: Adapter,
    *,
    learns: Learns,
    groups: Mapping[str, Sequence[int]] | None = None,
    steps: int = 100,
    batch: int = 8,
    rate: float | None = None,
    relative: bool = True,
    seed: int = 0,
    loss: DistillationLoss | None = None,
    stopping: Stopping | None = None,
    beside: tuple[Sequence[Tensor], float] = ((), 0.0),
    keeping: Keeping | None = None,
) -> Distilled:
    """Move a merge towards every adapter's predictions on that adapter's own texts; no labels.

    This is multi-teacher distillation: each text is answered by its own adapter alone, never by an average of them.

    Args:
        panel: Base, adapters and texts.
        merge: Where to start, its scale folded in.
        learns: "weights": one number per group of ranks and module multiplies the merge's parts, so nothing new can be
            learnt; "factors": A and B themselves move (AdamW without decay).
        groups: Module -> sizes of the groups of its ranks, such as one per adapter; by default one group a module.
        steps: How many at most, each of one batch of every adapter's texts; none leave the merge as it is.
        batch: Texts of each adapter in a step.
        rate: Rate of Adam; see `RATES`.
        relative: Whether a rate of factors is one relative to each factor's root mean square, and rises at first.
        seed: Seed of the order of the texts.
        loss: What is made small; by default the distance from the adapters' predictions.
        stopping: When to stop before that; None to take all steps.
        beside: Tensors of the loss that move too, such as heads, and the rate of Adam for them at the start.
        keeping: Where it goes on from, and is kept.

    Raises:
        RunError: A loss that is not finite.

    Cost: `steps` forward and backward passes of the base on adapters x batch texts; before them two passes over all texts, whose
    answers are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    relative = relative and learns == "factors"
    learning = Learning.of(panel, merge, learns, groups or {}, rate or RATES[learns], steps, beside, relative=relative)
    loss = loss or loss_of(panel)
    orders = [_endless(len(panel.texts[p.name]), batch, generator) for p in panel.parts]
    frozen = _frozen(learning.model)
    done = keeping.go_on(learning, loss) if keeping else 0
    try:
        for step in range(1, steps + 1):
            if (
                step % AHEAD == 1
            ):  # the texts of steps that were taken before are drawn too: those that follow hang on them
                coming = [[next(o) for o in orders] for _ in range(min(AHEAD, steps + 1 - step))]
                if step > done:
                    loss.prepare(coming, learning.applying)
            if step <= done:
                continue
            learning.step(loss, coming[(step - 1) % AHEAD])
            if stopping and (step % stopping.every == 0 or step == steps) and learning.looked(stopping, step):
                break
            if keeping and step % AHEAD == 0:
                keeping.keep(learning, loss, step)
    finally:
        _thaw(frozen)
    seen = torch.stack(learning.losses).float().cpu().tolist() if learning.losses else []
    if not all(map(math.isfinite, seen)):
        raise RunError("the distillation's loss is not finite", hint="a smaller rate, or float32")
    few = max(1, len(seen) // 10)
    weights = {m: p.learnt() for m, p in learning.students.items()} if learns == "weights" else {}
    first, last = (float(np.mean(part)) if part else float("nan") for part in (seen[:few], seen[-few:]))
    best = max(learning.looks, key=lambda look: look.kept, default=Look(len(seen), 0.0))
    adapter = merge if not seen else learning.best or learning.now()
    return Distilled(adapter, first, last, weights, best.step, tuple(learning.looks))


@dataclass(slots=True)
class Learning:
    """A merge while it learns."""

    merge: Adapter
    model: Any
    students: Mapping[str, Student]
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    changes: list[tuple[Any, Any]]
    losses: list[Tensor] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: Adapter | None = None
    beside: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls,
        panel: Panel,
        merge: Adapter,
        learns: str,
        groups: Mapping[str, Sequence[int]],
        rate: float,
        steps: int,
        beside: tuple[Sequence[Tensor], float] = ((), 0.0),
        *,
        relative: bool = False,
    ) -> Learning:
        """Begin with a merge as it is."""
        device, model = panel.base.torch_device, panel.model(panel.parts[0])
        linear = {m: f for m, f in merge.modules.items() if f.kind == LINEAR}
        students = {m: Student.of(f, learns, groups.get(m), device, relative) for m, f in linear.items()}
        kinds = [([p for student in students.values() for p in student.parameters], rate), (list(beside[0]), beside[1])]
        optimiser = torch.optim.AdamW([{"params": p, "lr": r} for p, r in kinds if p], lr=rate, weight_decay=0.0)
        warm = WARM_UP * steps if relative else 0.0
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / max(1.0, warm)) * (1 - step / max(1, steps))
        )
        changes = [(resolve(model, m, merge.prefix), student.change) for m, student in students.items()]
        return cls(merge, model, students, optimiser, schedule, changes, beside=beside[0])

    @property
    def parameters(self) -> list[Tensor]:
        """All that moves, in order."""
        return [*(p for student in self.students.values() for p in student.parameters), *self.beside]

    def step(self, loss: DistillationLoss, rows: Sequence[Sequence[int]]) -> None:
        """Take one step on these texts."""
        value = loss(rows, self.applying)
        self.optimiser.zero_grad()
        value.backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(value.detach())

    def applying(self) -> AbstractContextManager[None]:
        """Make the merge as it is now the model's active adapter within the block."""
        return hooked(self.changes)

    def now(self) -> Adapter:
        """Give the merge as it is now."""
        changed = {m: self.students[m].factors() if m in self.students else f for m, f in self.merge.modules.items()}
        return replace(self.merge, modules=changed)

    def looked(self, stopping: Stopping, step: int) -> bool:
        """Look at the texts held out, keep the merge where it is the best so far; whether it is time to stop."""
        adapter = self.now()
        look = Look(step, stopping.score(adapter))
        if not self.looks or look.kept > max(x.kept for x in self.looks):
            self.best = adapter
        self.looks.append(look)
        stopping.on_look(look)
        highest = max(range(len(self.looks)), key=lambda i: self.looks[i].kept)
        return len(self.looks) - 1 - highest >= stopping.patience


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
