"""Output gradients of a task's rows, put beside its moments: what the base would answer is drawn, labels are not looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from plait.errors import UsageError
from plait.model.base import draw_head, head_modules
from plait.model.ranks import rank, world_size
from plait.runs.session import Session
from plait.seeds import named_seed
from plait.statistics.distributed import own_share
from plait.statistics.moments import Statistics
from plait.statistics.output_gradients import with_output_gradients
from plait.tasks import Task, batches, to_device
from plait.tasks.encoding import encode
from plait.tasks.task import TEXT_KINDS
from plait.tasks.text_alone import UNKNOWN


def with_curvature(statistics: Mapping[str, Statistics], session: Session, seed: int) -> dict[str, Statistics]:
    """Add every task's output gradients, from the rows that its statistics were taken from, where they hold none yet.

    Args:
        statistics: Task -> statistics.
        session: Base, rows, and how many rows a forward pass takes.
        seed: Of the rows, the heads and what is drawn.

    Cost: one forward and one backward pass over the rows of the statistics.
    """
    curved = dict(statistics)
    for name, own in statistics.items():
        if not own.output_gradients:
            task = session.tasks[name]
            rows = encode(session.evaluator.tokenizer, task, session.sample(name, seed), session.recipe.data.max_length)
            curved[name] = beside(own, session, task, rows, seed)
    return curved


def beside(
    statistics: Statistics, session: Session, task: Task, rows: Sequence[Any], seed: int, first: int = 0
) -> Statistics:
    """Add the output gradients of encoded rows to the moments of the same rows.

    A base that has no head yet gets one drawn anew for every batch, and its own head back afterwards. What is drawn for a batch
    depends on its place among the rows alone: neither on shards nor on how many processes share them.

    Args:
        statistics: Moments of the rows.
        session: Base, and how many rows a forward pass takes.
        task: The task.
        rows: Encoded rows; under torchrun of all processes.
        seed: Of the heads and the answers that are drawn.
        first: Place of the first row among the task's, where these are a shard.

    Raises:
        UsageError: A task of a model that reads and writes apart (seq2seq), or one whose number of classes nobody says.
    """
    if task.kind == "seq2seq":
        raise UsageError(
            "output gradients are of models that classify, or that write on from what they read; this is seq2seq",
            where=f"task {task.name}",
            hint="leave output_gradients (or curvature) out",
        )
    if task.kind == "classification" and not task.label_column and task.labels == UNKNOWN:
        raise UsageError(
            "output gradients are those of a head, and rows without labels do not say how many classes it has",
            where=f"task {task.name}",
            hint=f"--label COLUMN, or --set tasks.{task.name}.labels=[...]",
        )
    evaluator, device = session.evaluator, session.base.torch_device
    model = evaluator.task_model(task.name)
    fresh = [] if task.kind in TEXT_KINDS else head_modules(model)
    answers = torch.Generator()
    each = batches(evaluator.tokenizer, rows, session.recipe.statistics.batch_size, by_length=True)

    def draw(batch: int) -> None:
        place = f"{task.name}, row {first}, batch {rank() + batch * world_size()}"
        answers.manual_seed(named_seed(seed, f"{place}, answers"))
        if fresh:
            draw_head(model, named_seed(seed, place))

    with _unchanged(model, fresh):
        given = (to_device(b, device) for b in own_share(each))
        return with_output_gradients(statistics, model, given, before=draw, generator=answers, drawn_heads=bool(fresh))


@contextlib.contextmanager
def _unchanged(model: nn.Module, modules: Sequence[str]) -> Iterator[None]:
    """Within, the parameters of some modules may change; afterwards they are what they were."""
    parameters = [p for n in modules for p in model.get_submodule(n).parameters()]
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
