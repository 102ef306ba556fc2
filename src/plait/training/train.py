"""Training one adapter on one task, with the HF Trainer and PEFT, resumable."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import to_json
from plait.disk.locks import locked, writing_to
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.store import is_done, staged_folder
from plait.errors import EnvironmentFault, InputError, PlaitError, UsageError
from plait.model.base import BaseModel, load_task_model, load_tokenizer, quiet_transformers
from plait.model.identity import base_facts
from plait.model.ranks import is_writer
from plait.statistics.moments import Statistics
from plait.tasks import Examples, Task, collate, require_positions
from plait.tasks.encoding import encode_counted
from plait.training.checkpoints import (
    bytes_of_training,
    checkpoint_root,
    latest_whole,
    leave_no_empty,
    open_root,
    require_begun_alike,
    run_name,
    said_kept,
)
from plait.training.member import Member, Progress
from plait.training.peft_model import attach, detach, for_task, named_for, silence_dropout
from plait.training.prepare import prepare_constraint
from plait.training.record import TrainRecord
from plait.training.settings import TrainingSettings, scale_order
from plait.training.sharding import average_adapter, shard_base


def train_adapter(
    initial: Adapter,
    task: Task,
    examples: Examples,
    base: BaseModel,
    settings: TrainingSettings,
    *,
    seed: int,
    out: Path | str,
    identity: Mapping[str, Any],
    overwrite: bool = False,
    progress: Progress | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    selection: Examples | None = None,
) -> Adapter:
    """Train an adapter on one task and write it as a PEFT folder.

    Args:
        initial: What to start from; its own head for this task is continued, otherwise one is drawn from `seed`.
        task: The task.
        examples: Its training rows.
        base: The base model, which stays as it is.
        settings: Steps, rates, constraint.
        seed: Seed of the head, the order of the rows and dropout.
        out: The folder to write; checkpoints lie beside it in ``.NAME.checkpoints`` until it is finished.
        identity: What the result is (`plait.disk.store.identity`); a folder that already holds it is read, not redone.
        overwrite: Train even where `out` holds something.
        progress: Called after each step with the step, the number of steps and the last logged loss.
        statistics: Task -> statistics, of all tasks; for the constraints "projected" and "penalised".
        selection: Rows to score the adapter on every `evaluate_every` steps: the best of these adapters is the result,
            and `patience` of them without a better score end the run. Not the rows that are reported.

    Returns:
        The trained adapter with its head, as read back from `out`. The manifest's result holds the task, the backbone's
        attribute, labels, kind, a summary of the losses, seconds, and the hash of the base's weights.

    Raises:
        Diverged: The loss became NaN or infinite.
        InputError: The adapter does not fit the base, or there are no rows.
        UsageError: The settings tie this adapter to others (see `train_fleet`).

    Cost:
        One forward and one backward pass a step; killed at any moment and started again, it goes on from its last whole
        checkpoint, on the CPU to the same bits.
    """
    member = Member(initial, task, examples, settings, seed, Path(out), identity, statistics, selection)
    return train_member(member, base, overwrite=overwrite, progress=progress)


def train_member(m: Member, base: BaseModel, *, overwrite: bool = False, progress: Progress | None = None) -> Adapter:
    """Train one member on its own; see `train_adapter`.

    Args:
        m: The adapter and what it is trained with.
        base: The base model, which stays as it is.
        overwrite: Train even where its folder holds something.
        progress: Called after each step with the step, the number of steps and the last logged loss.
    """
    settings, out = m.settings, m.out
    if settings.tied is not None:
        raise UsageError("tied adapters are trained together, as a fleet", where=f"task {m.task.name}")
    require_apart(out, [str(m.initial.source.get("path", ""))])
    if is_done(out, m.identity, overwrite=overwrite):
        return read_adapter(out)
    if len(m.examples) == 0:
        raise InputError("no training rows", where=f"task {m.task.name}")
    settings.require_snapshots(len(m.examples), m.task.name)
    root = checkpoint_root(out)
    require_space(out, bytes_of_training(m.initial, settings, begins=not root.exists()))
    started = time.monotonic()
    gpus = [base.torch_device] if base.torch_device.type == "cuda" else []
    with _held(root, out), _quiet(), torch.random.fork_rng(devices=gpus):
        if is_writer():
            if not overwrite:
                require_begun_alike(out, m.identity)
            open_root(root, m.identity)
        try:
            trained, record = _run(m, base, root, progress)
        except BaseException as e:
            if is_writer():
                refused = isinstance(e, PlaitError)
                if refused:
                    leave_no_empty(root)
                if (not refused or isinstance(e, EnvironmentFault)) and (kept := said_kept(root)):
                    e.add_note(kept)
            raise
    seconds, completed = round(time.monotonic() - started, 3), m.initial.source.get("completed")
    record = replace(record, seconds=seconds, base=base_facts(base), completed=completed)
    if not is_writer():
        return trained
    with staged_folder(out, m.identity, overwrite=overwrite, result=to_json(record)) as stage:
        write_adapter(stage, trained)
        _write_snapshots(root, stage)
    shutil.rmtree(root, ignore_errors=True)
    return read_adapter(out)


def _run(m: Member, base: BaseModel, root: Path, progress: Progress | None) -> tuple[Adapter, TrainRecord]:
    from plait.training.callbacks import ConstraintCallback, DrawnScales, Snapshots, Watcher
    from plait.training.selection import BestAdapter
    from plait.training.trainer import TaskTrainer, training_arguments

    task, settings = m.task, m.settings
    tokenizer, model = load_tokenizer(base), _loaded(base, task, settings, m.seed)
    started = for_task(named_for(m.initial, base), task, model)
    constraint = prepare_constraint(settings, started, m.statistics, task=task.name)
    peft_model = attach(model, started, dropout=settings.dropout)
    rows, cut = encode_counted(tokenizer, task, m.examples, settings.max_length)
    require_positions(model, (len(r["input_ids"]) for r in rows), f"task {task.name}")
    total = settings.total_steps(len(rows))
    drawn = [DrawnScales(scale_order(settings, total, m.seed).tolist(), peft_model)] if settings.scale_from < 1 else []
    callbacks: list[Any] = [
        *drawn,  # first: it puts the scale back before the others look
        Watcher(progress),
        ConstraintCallback(constraint, peft_model),
        Snapshots(settings.snapshots, root, peft_model, started),
    ]
    chooser = None
    if m.selection is not None and settings.evaluate_every is not None:
        chooser = BestAdapter(settings, task, m.selection, tokenizer, peft_model, started, root)
        callbacks.append(chooser)
    arguments = training_arguments(settings, total, m.seed, root, base)
    if settings.shard_base:
        shard_base(peft_model, arguments.device)
    trainer = TaskTrainer(
        task=task,
        settings=settings,
        rows=rows,
        model=peft_model,
        args=arguments,
        data_collator=functools.partial(collate, tokenizer),
        callbacks=callbacks,
    )
    if settings.shard_base:
        average_adapter(trainer.accelerator)
    _settle_callbacks(trainer, root)
    trainer.accelerator.wait_for_everyone()
    checkpoint = latest_whole(root)
    with _out_of_memory(task, settings), writing_to(root):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve, steps = logged_losses(trainer.state.log_history), int(trainer.state.global_step)
    record = TrainRecord.of(task, started.prefix, curve, steps, cut)
    if chooser is not None:
        best, selected = chooser.best()
        return best, replace(record, selected=selected)
    return detach(trainer.accelerator.unwrap_model(trainer.model), started, {"task": task.name}), record


def _loaded(base: BaseModel, task: Task, settings: TrainingSettings, seed: int) -> Any:
    """The task's model; on the CPU where it is about to be split over processes."""
    if base.torch_dtype == torch.float16:
        raise UsageError("float16 cannot train: gradients underflow", where="base.dtype", hint="use bfloat16")
    if settings.shard_base and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError("shard_base splits the base over several processes, and there is one", hint="use torchrun")
    model = load_task_model(replace(base, device="cpu") if settings.shard_base else base, task, seed=seed)
    if not settings.base_dropout:
        silence_dropout(model)
    return model


def _settle_callbacks(trainer: Any, root: Path) -> None:
    """Take off the Trainer's own lines and bars, and send TensorBoard's files where they outlive the checkpoints."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
        elif type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(root.with_name(f"{run_name(root)}.runs"))


def logged_losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """List (step, mean loss since the one before) as the Trainer logged them, across resumptions."""
    return [(int(h["step"]), float(h["loss"])) for h in history if "loss" in h]


def _write_snapshots(root: Path, stage: Path) -> None:
    for folder in sorted((root / "steps").glob("[0-9]*")) if (root / "steps").is_dir() else []:
        shutil.copytree(folder, stage / "steps" / folder.name)


def _held(root: Path, out: Path) -> contextlib.AbstractContextManager[None]:
    """Two runs must not share checkpoints; of one run's processes the writer holds them."""
    return locked(root, output=out, doing="a training") if is_writer() else contextlib.nullcontext()


@contextlib.contextmanager
def _out_of_memory(task: Task, settings: TrainingSettings) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise EnvironmentFault(
            f"out of GPU memory at batch size {settings.batch_size}, length {settings.max_length}",
            where=f"task {task.name}",
            hint="raise accumulation, lower max_length, or precision bf16",
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No chatter from transformers and accelerate while training; their levels are put back."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
