"""What a run would do, and how long it would take on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from plait.recipes.recipe import Recipe
from plait.runs.layout import Layout
from plait.runs.lengths import Cuts, sentences
from plait.runs.pending import cost, pending
from plait.runs.run import overlook, planned, require_sound
from plait.runs.session import Session
from plait.runs.units import TRAIN
from plait.tasks import batches, to_device
from plait.tasks.encoding import Row, encode

# Rows of the first look, and how long the second may take by it, so that a slow machine is not kept busy for minutes.
_FIRST, _SECONDS = 4, 5.0


@dataclass(frozen=True, slots=True)
class StageCount:
    """Units of one stage.

    Args:
        units: How many there are.
        reused: How many are there already.
    """

    units: int
    reused: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would do.

    Args:
        out: Its folder.
        tuned: Whether rates are swept first; then this is the sweep alone.
        stages: Stage -> its units.
        adapters: Adapters that are trained.
        rows: Task -> rows by split.
        cut: Task -> split -> how many rows are longer than `data.max_length`.
        cut_said: The same in a sentence for each task and split of which rows are cut.
        forward_rows: Rows through the base that are still to come, training counted 3.5 times.
        seconds_per_row: What one of them takes here, measured; None where it was not, or nothing is to be done.
        seconds: What they take together at that pace.
    """

    out: str
    tuned: bool
    stages: Mapping[str, StageCount]
    adapters: int
    rows: Mapping[str, Mapping[str, int]]
    cut: Cuts
    cut_said: Sequence[str]
    forward_rows: int
    seconds_per_row: float | None = None
    seconds: float | None = None


def describe(recipe: Recipe, out: Path, *, measure: bool = False) -> Forecast:
    """Say what `run` would do, without doing it.

    Args:
        recipe: The recipe.
        out: Where it would run.
        measure: Load the base and time it on a batch of every task.

    Raises:
        InputError: An answer of a causal task does not fit `data.max_length`.

    Cost: hashes the data and the base once, and tokenises up to a thousand rows of each task and split.
    """
    layout = Layout(recipe, out, mend=overlook, overwrite=True)
    require_sound(layout)
    units = planned(layout)
    todo = set(pending(layout, units))
    stages = {}
    for stage in dict.fromkeys(u.stage for u in units):
        these = [u for u in units if u.stage == stage]
        stages[stage] = StageCount(len(these), sum(u not in todo for u in these))
    trained = sum(len(layout.of(u).session.tasks) for u in units if u.stage == TRAIN)
    rows = {t: {"validation": len(layout.session.validation(t))} for t in layout.session.tasks}
    cost_left = sum(cost(u, layout) for u in todo)
    pace = seconds_per_row(layout.session) if measure and todo else None
    return Forecast(
        str(out.absolute()), recipe.tuned, stages, trained, rows, layout.cuts,
        sentences(layout.cuts, layout.session.tasks), round(cost_left),
        pace, None if pace is None else pace * cost_left,
    )  # fmt: skip


def seconds_per_row(session: Session) -> float:
    """Time one forward pass of a row: of every task a batch as scores take it, or as much of one as some seconds hold."""
    spent, count = 0.0, 0
    for name, task in session.tasks.items():
        evaluator = session.evaluator
        examples = session.validation(name)
        some = examples.take(range(min(len(examples), session.recipe.evaluation.batch_size)))
        rows = encode(evaluator.tokenizer, task, some, session.recipe.data.max_length)
        few = rows[:_FIRST]
        _pass(session, name, few)  # to warm up
        number = max(len(few), min(len(rows), int(_SECONDS * len(few) / _pass(session, name, few))))
        spent += _pass(session, name, rows[:number])
        count += number
    return spent / count


def _pass(session: Session, name: str, rows: list[Row]) -> float:
    """Seconds of one forward pass of a task's rows, as one batch."""
    evaluator, task, device = session.evaluator, session.tasks[name], session.base.torch_device
    model = evaluator.task_model(name)
    batch = next(iter(batches(evaluator.tokenizer, rows, len(rows))))
    inputs = to_device({k: v for k, v in batch.items() if k != "labels" or task.kind == "seq2seq"}, device)
    started = time.perf_counter()
    with torch.inference_mode():
        model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
