"""Statistics of one task, to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.border.checked import Json
from plait.border.records import optional
from plait.disk.overwriting import require_replaceable_file
from plait.disk.store import identity
from plait.errors import InputError, UsageError
from plait.model.ranks import is_writer
from plait.options import require_known
from plait.recipes.recipe import Settings
from plait.runs.collecting import collect_file, is_collected
from plait.runs.lengths import say_of_rows
from plait.runs.session import Session
from plait.runs.unlabelled import text_alone_where_unlabelled
from plait.statistics import open_statistics
from plait.statistics.files import is_statistics


@dataclass(frozen=True, slots=True)
class Collected:
    """Statistics in a file.

    Args:
        output: The file, absolute.
        task: Its task.
        samples: Rows that were read.
        tokens: Tokens that were counted.
        sites: Distinct layer inputs.
        output_gradients: Modules of which output gradients were taken.
        memory: What a budget chose, where one was given.
        reused: Whether the file was there already.
        cut: What `data.max_length` took from the rows, as the file says; None where it took nothing.
    """

    output: str
    task: str
    samples: int | None
    tokens: int | None
    sites: int
    output_gradients: int
    memory: Mapping[str, Any] | None
    reused: bool
    cut: Mapping[str, Any] | None = optional()


def collect_one(settings: Settings, task: str, out: Path, *, seed: int, overwrite: bool) -> Collected | None:
    """Write the statistics of one task to a file; under torchrun, by all of its processes together.

    Labels are not looked at; of a task whose rows have none, and of which no label column is named, the texts are read alone.

    Returns:
        What was collected; None in every process but torchrun's first.
    """
    require_known(task, settings.task_names, "task")
    session = Session(text_alone_where_unlabelled(settings, task))
    wanted = identity("statistics", _measured(session, task), seed=seed)
    if overwrite:
        require_replaceable_file(out, is_statistics)
    try:
        reused = is_collected(out, wanted)
    except (UsageError, InputError):  # other settings, or a damaged file
        if not overwrite:
            raise
        reused = False
    if not reused:
        if is_writer():
            say_of_rows(session, task, session.sample(task, seed), split="train")
        collect_file(session, task, out, seed=seed, wanted=wanted, overwrite=overwrite)
    if not is_writer():
        return None
    statistics = open_statistics(out)
    known = {key: statistics.provenance.get(key) for key in ("samples", "tokens", "memory", "cut")}
    sites, gradients = len(statistics.sites), len(statistics.output_gradients)
    return Collected(str(out.absolute()), task, sites=sites, output_gradients=gradients, reused=reused, **known)


def _measured(session: Session, task: str) -> Json:
    """What the statistics of a task depend on, besides the seed."""
    settings = session.recipe
    spec = settings.statistics
    unset = (set() if spec.follows_batches else {"batch_size"}) | {
        k for k in ("memory", "output_gradients") if not getattr(spec, k)
    }
    return {
        "base": session.base_sha256,
        "dtype": settings.base.dtype,
        "data": session.data_identity(task),
        "targets": settings.adapted.target_modules,
        **settings.adapted.limits,
        "max_length": settings.data.max_length,
        **spec.model_dump(exclude=unset),
    }
