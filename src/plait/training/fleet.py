"""Training many adapters of one frozen base in one process."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import LINEAR, Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.counts import plural
from plait.border.records import to_json
from plait.disk.locks import locked
from plait.disk.space import require_space
from plait.disk.store import is_done, staged_folder
from plait.errors import Diverged, EnvironmentFault, InputError, UsageError
from plait.model.base import BaseModel
from plait.model.identity import base_facts
from plait.training.checkpoints import bytes_of_training, checkpoint_root
from plait.training.fleet_run import Shared, members_at_once, run_batched
from plait.training.fleet_state import interrupted, let_go
from plait.training.member import Member, Progress
from plait.training.outcome import Outcome
from plait.training.record import TrainRecord
from plait.training.train import train_member

_WRITERS = 8  # folders written at once: each waits for the disk several times over


def train_fleet(
    members: Sequence[Member],
    base: BaseModel,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    limit: int | None = None,
) -> list[Adapter]:
    """Train many adapters, the base's forward and backward pass running once for all rows of a step.

    Each member ends where `train_adapter` would have brought it, to rounding: the same rows in the same order, its own
    head, rate, clipping, AdamW state and constraint. Members that cannot be stacked (dropout, early stopping, trackers,
    embeddings) are trained alone.

    Args:
        members: Members in any order; no two with one `out`.
        base: The base model.
        overwrite: Train even where a folder holds something.
        progress: Called with steps done, steps to do (over all members) and the mean loss of late.
        limit: At most so many members at once; by default as many as memory and the device's appetite allow. Where
            memory runs out all the same, the members are split in two, which begin again.

    Returns:
        The adapters in the order of the members, as read back from their folders.

    Raises:
        Diverged: The loss of some members became NaN or infinite; the others are finished and written first. Its `lost`
            says which folders are missing, and why.
        EnvironmentFault: Another process trains one of them.
        UsageError: Without `overwrite`, what an interrupted fleet kept of some of them would be lost.

    Cost:
        Per step about one forward and one backward pass on the stacked rows, the base in the autocast dtype.

    **Deviates**: A half-precision base or precision "bf16" holds the base's matrices in bf16 once; the HF Trainer casts
    them on every pass. Factors, heads, and optimiser states are float32 in both.
    """
    members = list(members)
    places = [str(Path(m.out).absolute()) for m in members]
    if twice := [p for p in places if places.count(p) > 1]:
        raise UsageError("two members write the same folder", where=twice[0], hint="give each a folder of its own")
    todo = _unfinished(members, overwrite)
    _require_trainable(members, todo)
    meter = _Meter(progress, sum(m.settings.total_steps(len(m.examples)) for m in todo))
    lost: dict[str, str] = {}

    together = [m for m in todo if stackable(m)]
    with contextlib.ExitStack() as held:
        for m in together:
            held.enter_context(locked(checkpoint_root(m.out), output=m.out, doing="a training"))
        begun = interrupted(members, together, overwrite=overwrite)
        for group in begun:
            lost |= _train_stack(group, base, overwrite, meter, begun=True)
        resumed = {id(m) for group in begun for m in group}
        for group in _groups([m for m in together if id(m) not in resumed]):
            lost |= _train_stack(group, base, overwrite, meter, limit=limit)
    for member in (m for m in todo if not stackable(m)):
        lost |= _train_alone(member, base, overwrite, meter)

    if lost:
        raise Diverged(
            f"the loss of {len(lost)} of {plural(len(members), 'adapter')} became NaN or infinite: {', '.join(list(lost)[:5])}",
            hint="lower their learning rate; the others are written",
            lost=lost,
        )
    return [read_adapter(m.out) for m in members]


def _unfinished(members: Sequence[Member], overwrite: bool) -> list[Member]:
    """Members without a finished folder, and all that are tied to one of them: one adapter is trained whole."""
    unfinished = {id(m): m.settings.tied for m in members if not is_done(m.out, m.identity, overwrite=overwrite)}
    ties = set(unfinished.values()) - {None}
    return [m for m in members if id(m) in unfinished or m.settings.tied in ties]


def _require_trainable(members: Sequence[Member], todo: Sequence[Member]) -> None:
    """Refuse members that cannot be trained before any is: tied ones that do not go together, no rows, no room on the disk."""
    _require_alike(members)
    for m in todo:
        if len(m.examples) == 0:
            raise InputError("no training rows", where=f"task {m.task.name}")
        m.settings.require_snapshots(len(m.examples), m.task.name)
    if todo:
        require_space(Path(todo[0].out), sum(bytes_of_training(m.initial, m.settings, begins=False) for m in todo))


def stackable(member: Member) -> bool:
    """Whether a member can be trained in a stack; otherwise `train_fleet` trains it alone."""
    s = member.settings
    alone = (
        s.dropout > 0
        or s.base_dropout
        or (s.evaluate_every is not None and member.selection is not None)
        or s.report_to
        or s.shard_base
    )
    return not alone and all(f.kind == LINEAR for f in member.initial.modules.values())


def _require_alike(members: Sequence[Member]) -> None:
    """Refuse tied members that cannot be one adapter."""
    for name in {m.settings.tied for m in members} - {None}:
        tied = [m for m in members if m.settings.tied == name]
        if not all(stackable(m) for m in tied) or len({m.task.name for m in tied}) < len(tied):
            raise UsageError(
                "tied members need one task each, and settings that can be stacked", where=f"tied {name!r}"
            )
        if any(m.settings != tied[0].settings for m in tied):
            raise UsageError("tied members differ in their settings", where=f"tied {name!r}")


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Members that can be stepped together."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for m in members:
        text = m.task.kind if m.task.kind in ("causal", "seq2seq") else "head"
        s = m.settings
        key = (s.tied or "", text, s.batch_size, s.precision, s.max_length, s.total_steps(len(m.examples)))
        groups.setdefault(key, []).append(m)
    return [g for _, g in sorted(groups.items())]


def _train_stack(
    group: Sequence[Member],
    base: BaseModel,
    overwrite: bool,
    meter: _Meter,
    *,
    begun: bool = False,
    limit: int | None = None,
) -> dict[str, str]:
    """Train members that can be stepped together; returns folder -> reason of those that failed.

    Args:
        group: The members.
        base: The base model.
        overwrite: Train even where a folder holds something.
        meter: Counts their steps.
        begun: Whether just these were trained together when a run ended: then they go on so, since rounding depends on who is together.
        limit: At most so many at once, where they are neither begun nor tied.
    """
    shared = Shared(group, base)
    order, size = list(range(len(group))), len(group)
    if not begun:
        order = shared.by_length()
        if not group[0].settings.tied:
            size = min(limit or size, members_at_once(shared))
    lost: dict[str, str] = {}
    for start in range(0, len(group), size):
        lost |= _train_group(order[start : start + size], shared, overwrite, meter)
    shared.release()
    return lost


def _train_group(chosen: list[int], shared: Shared, overwrite: bool, meter: _Meter) -> dict[str, str]:
    """Train members of a group, splitting them where memory runs out; returns folder -> reason of those that failed."""
    started = time.monotonic()
    done = meter.done
    outcome = _where_memory_lasts(shared, chosen, meter)
    if outcome is None:
        whole = len(chosen) == 1 or shared.members[0].settings.tied
        if whole and not shared.smaller_passes():
            raise EnvironmentFault(
                "out of memory with one row of one adapter at a time",
                hint="shorter rows (data.max_length), or --device cpu",
            )
        meter.done = done
        half = len(chosen) // 2
        parts = [chosen] if whole else [chosen[:half], chosen[half:]]
        if not whole:
            let_go([shared.members[i] for i in shared.in_order(chosen)])
        failures = [_train_group(part, shared, overwrite, meter) for part in parts]
        return {out: why for one in failures for out, why in one.items()}
    seconds = time.monotonic() - started

    def write(place: int) -> None:
        member = shared.members[outcome.order[place]]
        if outcome.failed[place]:
            return
        if overwrite or not is_done(member.out, member.identity):
            _write(member, outcome, place, shared, overwrite, seconds)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, range(len(outcome.order))))
    outcome.forget()
    lost = [place for place, failed in enumerate(outcome.failed) if failed]
    return {str(shared.members[outcome.order[place]].out): outcome.why(place) for place in lost}


def _where_memory_lasts(shared: Shared, chosen: list[int], meter: _Meter) -> Outcome | None:
    """Step some members to their end; None where memory ran out, and what the failed steps held is let go of."""
    with contextlib.suppress(torch.OutOfMemoryError):  # its frames hold the members' tensors as long as it is at hand
        return run_batched(shared, chosen, meter)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _write(member: Member, outcome: Outcome, place: int, shared: Shared, overwrite: bool, seconds: float) -> None:
    adapter = outcome.adapters[place]
    record = replace(
        TrainRecord.of(
            member.task, adapter.prefix, outcome.curve(place), len(outcome.losses), shared.cuts[outcome.order[place]]
        ),
        seconds=round(seconds / len(outcome.order), 3),
        fleet=len(outcome.order),
        completed=member.initial.source.get("completed"),
        base=base_facts(shared.base),
    )
    with staged_folder(member.out, member.identity, overwrite=overwrite, result=to_json(record)) as stage:
        write_adapter(stage, adapter)
        for step, snapshot in outcome.snapshots.get(place, {}).items():
            folder = stage / "steps" / f"{step:06d}"
            folder.mkdir(parents=True)
            write_adapter(folder, snapshot)


def _train_alone(m: Member, base: BaseModel, overwrite: bool, meter: _Meter) -> dict[str, str]:
    """Train a member that cannot be stacked; returns folder -> reason where it failed."""
    try:
        train_member(m, base, overwrite=overwrite, progress=lambda step, total, loss: meter(1, loss))
    except Diverged as e:
        return {str(m.out): e.what}
    return {}


class _Meter:
    """Adds up adapter-steps for `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, steps: int, loss: float | None) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(self.done, self.total, loss)
