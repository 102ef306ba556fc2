"""One adapter that is to be trained, with everything that its training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.statistics.moments import Statistics
from plait.tasks import Examples, Task
from plait.training.settings import TrainingSettings

# Steps done, of how many, and the last loss: called while members train.
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One adapter of a fleet: exactly what `train_adapter` takes.

    Args:
        initial: What it starts from.
        task: Its task.
        examples: Its training rows; members may share them.
        settings: Its own rates, steps, constraint.
        seed: Seed of its head and the order of its rows.
        out: The folder to write.
        identity: What the result is.
        statistics: Statistics of all tasks, where its constraint needs them.
        selection: Rows to choose its best moment by.
    """

    initial: Adapter
    task: Task
    examples: Examples
    settings: TrainingSettings
    seed: int
    out: Path
    identity: Mapping[str, Any]
    statistics: Mapping[str, Statistics] | None = None
    selection: Examples | None = None


def rates_sweep(member: Member, rates: Mapping[str, float]) -> list[Member]:
    """Make one member per learning rate; each writes into ``NAME-KEY`` beside the member's own folder."""
    made = []
    for key, rate in rates.items():
        settings = replace(member.settings, lr=rate)
        identity = {**member.identity, "options": {**member.identity.get("options", {}), "lr": rate}}
        out = member.out.with_name(f"{member.out.name}-{key}")
        made.append(replace(member, settings=settings, out=out, identity=identity))
    return made
