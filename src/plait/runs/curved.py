"""Statistics with the curvature beside them, for the penalty that weighs shifts by what they do to predictions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from plait.model.base import draw_head, head_modules
from plait.runs.session import Session
from plait.seeds import named_seed
from plait.statistics.curvature import collect_curvature
from plait.statistics.moments import Statistics
from plait.tasks import batches, to_device
from plait.tasks.encoding import encode
from plait.tasks.task import TEXT_KINDS


def with_curvature(statistics: Mapping[str, Statistics], session: Session, seed: int) -> dict[str, Statistics]:
    """Add every task's curvature at all modules of its statistics, from the rows that these were taken from.

    What the gradients are of is drawn from the base itself, never from labels. A base that has no head yet gets one drawn anew for every
    batch, and its own head back afterwards.

    Args:
        statistics: Task -> statistics.
        session: Base, rows, and how many rows a forward pass takes.
        seed: Of the rows, the heads and what is drawn.

    Cost: one forward and one backward pass over the rows of the statistics.
    """
    curved: dict[str, Statistics] = {}
    for name, own in statistics.items():
        task, evaluator = session.tasks[name], session.evaluator
        model = evaluator.task_model(name)
        rows = encode(evaluator.tokenizer, task, session.sample(name, seed), session.recipe.data.max_length)
        given = batches(evaluator.tokenizer, rows, session.recipe.statistics.batch_size, by_length=True)
        fresh = [] if task.kind in TEXT_KINDS else head_modules(model)
        heads = [p for n in fresh for p in model.get_submodule(n).parameters()]
        before = [p.detach().clone() for p in heads]
        redraw = functools.partial(_draw, model, seed, name) if fresh else None
        try:
            curvature = collect_curvature(
                model,
                (to_device(b, session.base.torch_device) for b in given),
                list(own.modules),
                redraw=redraw,
                generator=torch.Generator().manual_seed(named_seed(seed, name)),
            )
        finally:
            with torch.no_grad():
                for p, value in zip(heads, before, strict=True):
                    p.copy_(value)
        curved[name] = replace(own, curvature=curvature)
    return curved


def _draw(model: torch.nn.Module, seed: int, task: str, batch: int) -> None:
    draw_head(model, named_seed(seed, f"{task}, batch {batch}"))
