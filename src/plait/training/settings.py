"""How an adapter is trained: the settings, the learning-rate schedule and the order of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.border.checked import LARGEST_NUMBER, Json, Record, shown
from plait.errors import UsageError

SCHEDULES = ("linear", "cosine", "constant")
CONSTRAINTS = ("free", "frozen", "projected", "penalised")
WITH_STATISTICS = "penalised"  # what `plait train --statistics` does where nothing is named: docs/study/findings.md
CONSTRAINT_OPTIONS = {"projected": {"m", "method", "rho"}, "penalised": {"beta", "curvature"}}
_WHERE = "training settings"
_LATER = {"scale_from": 1.0}  # settings that came after the first results, and what off is
PRECISIONS = ("fp32", "bf16")
LARGEST_BATCH = 1 << 16  # rows are drawn for whole steps: with more, a slip of the hand asks for all memory there is
LARGEST_STEPS, LARGEST_EPOCHS = 10**9, 10**6  # centuries; the order of all rows is drawn before the first step


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings of one training run.

    >>> TrainingSettings(epochs=3, batch_size=32).total_steps(rows=100)
    10

    Args:
        steps: Optimiser steps, at most `LARGEST_STEPS`; exactly one of `steps` and `epochs` is given.
        epochs: Passes over the rows, above 0 and at most `LARGEST_EPOCHS`; rounded up to whole steps.
        lr: Learning rate of the LoRA factors (and of the head unless `head_lr` is given), AdamW.
        batch_size: Rows a step, over all processes and accumulation steps; at most `LARGEST_BATCH`.
        accumulation: Backward passes a step; divides `batch_size`.
        warmup_ratio: Fraction of the steps in which the rate rises from 0, in [0, 1).
        weight_decay: AdamW's, on matrices only.
        schedule: "linear" or "cosine" down to 0, or "constant".
        max_length: Tokens a row may have.
        head_lr: Learning rate of the task's head; None takes `lr`.
        max_grad_norm: Gradients are scaled down to this norm over all trained tensors of the adapter; 0 for off.
        dropout: On the input of A (PEFT's lora_dropout), in [0, 1).
        base_dropout: Whether the base's own dropout is on. Off by default: then a run is a function of rows and seed
            alone, and a fleet equals solo runs.
        checkpoint_every: Steps between the checkpoints a killed run restarts from; None for none.
        snapshots: Steps after which the adapter of that moment is kept under ``steps/NNNNNN`` in its folder.
        constraint: How A is kept in its subspace (see `plait.training.constraints`). Where `plait train` is given statistics
            and nothing names a constraint, it is `WITH_STATISTICS`.
        constraint_options: Its options: ``m``, ``method``, ``rho``; ``beta``, ``curvature``.
        precision: "fp32", or "bf16" for autocast around the forward pass; factors and optimiser stay float32.
        evaluate_every: Steps between scores on the selection rows, where those are given; the best adapter is kept.
        patience: Evaluations without a better score after which training stops; None trains to the end.
        shard_base: Under torchrun, split the frozen base over the processes (FSDP2), for bases that one GPU cannot hold;
            adapter and head stay whole in each.
        report_to: Trackers of the HF Trainer ("tensorboard", "wandb", "trackio"); none by default. The run is named after
            the adapter's folder; TensorBoard's files lie beside it in ``NAME.runs``.
        scale_from: The update of every step is scaled by a number drawn evenly from here to 1, so that an adapter works at
            smaller scales too, as a merge will use it; 1 for off. Source: DELTA, arXiv 2605.18993.
        tied: Members of a fleet with one name here train one adapter together, each on its own task and with its own
            head: joint multi-task training. They start from the same factors.
    """

    steps: int | None = None
    epochs: float | None = None
    lr: float = 4e-4
    batch_size: int = 32
    accumulation: int = 1
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "linear"
    max_length: int = 128
    head_lr: float | None = None
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    base_dropout: bool = False
    checkpoint_every: int | None = None
    snapshots: tuple[int, ...] = ()
    constraint: str = "free"
    constraint_options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    evaluate_every: int | None = None
    patience: int | None = None
    shard_base: bool = False
    report_to: tuple[str, ...] = ()
    tied: str | None = None
    scale_from: float = 1.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("give exactly one of steps and epochs", where=_WHERE)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("constraint", self.constraint, CONSTRAINTS)
        _one_of("precision", self.precision, PRECISIONS)
        counts = {
            k: getattr(self, k) for k in ("steps", "batch_size", "accumulation", "max_length", "checkpoint_every")
        }
        counts |= {"evaluate_every": self.evaluate_every, "patience": self.patience}
        needed = ("batch_size", "accumulation", "max_length")
        for name, value in counts.items():
            if (value is not None or name in needed) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                _refuse(name, value, "an integer of at least 1")
        if self.batch_size > LARGEST_BATCH:
            _refuse("batch_size", self.batch_size, f"an integer of at most {LARGEST_BATCH}")
        if self.steps is not None and self.steps > LARGEST_STEPS:
            _refuse("steps", self.steps, f"an integer of at most {LARGEST_STEPS}")
        if not isinstance(self.snapshots, tuple) or not all(type(s) is int and s >= 1 for s in self.snapshots):
            _refuse("snapshots", self.snapshots, "a list of steps, from 1")
        if not isinstance(self.report_to, tuple) or not all(isinstance(name, str) for name in self.report_to):
            _refuse("report_to", self.report_to, "a list of trackers, such as [tensorboard]")
        self._check_numbers()
        if self.patience is not None and self.evaluate_every is None:
            _refuse("patience", self.patience, "none without evaluate_every, whose evaluations it counts")
        if self.batch_size % self.accumulation:
            _refuse("accumulation", self.accumulation, f"a divisor of batch_size {self.batch_size}")

    def _check_numbers(self) -> None:
        for name in (
            "lr",
            "epochs",
            "head_lr",
            "weight_decay",
            "max_grad_norm",
            "warmup_ratio",
            "dropout",
            "scale_from",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                _refuse(name, value, "a number")
            if value is not None and not abs(value) <= LARGEST_NUMBER:
                _refuse(name, value, "a finite number")
            if value is None and name not in ("epochs", "head_lr"):
                _refuse(name, value, "a number")
        for name in ("base_dropout", "shard_base"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")
        if not isinstance(self.tied, str | None):
            _refuse("tied", self.tied, "a name")
        _check_constraint(self.constraint, self.constraint_options)
        _within("lr", self.lr, 0.0, math.inf, open_below=True)
        _within("epochs", self.epochs, 0.0, math.inf, open_below=True)
        if self.epochs is not None and self.epochs > LARGEST_EPOCHS:
            _refuse("epochs", self.epochs, f"a number of at most {LARGEST_EPOCHS}")
        _within("head_lr", self.head_lr, 0.0, math.inf)
        _within("weight_decay", self.weight_decay, 0.0, math.inf)
        _within("max_grad_norm", self.max_grad_norm, 0.0, math.inf)
        _within("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        _within("dropout", self.dropout, 0.0, 1.0)
        if not 0.0 < self.scale_from <= 1.0:
            _refuse("scale_from", self.scale_from, "a number above 0 and at most 1")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps on this many rows."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0.0) * rows / self.batch_size)

    def require_snapshots(self, rows: int, task: str) -> None:
        """Refuse snapshots after the last step: they would not be taken, and nobody would be told.

        Raises:
            UsageError: Names the first of them.
        """
        total = self.total_steps(rows)
        if late := [s for s in sorted(self.snapshots) if s > total]:
            raise UsageError(f"snapshot after step {late[0]}, and the training has {total}", where=f"task {task}")

    def factor(self, step: int, total: int) -> float:
        """Learning rate of step `step` (from 0) of `total`, as a fraction of `lr`."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))) if self.schedule == "cosine" else 1.0


def identity_of(settings: TrainingSettings) -> Json:
    """Say all settings, as an identity of what is trained by them holds them.

    Those that were added after results had been written are left out where they are off: these stay what they were.
    """
    whole = asdict(settings)
    return {k: v for k, v in whole.items() if k not in _LATER or v != _LATER[k]}


def scale_order(settings: TrainingSettings, total: int, seed: int) -> npt.NDArray[np.float64]:
    """Draw what the update of each step is scaled by; a function of the seed alone, as `row_order` is.

    >>> scale_order(TrainingSettings(steps=2), 2, seed=0).tolist()
    [1.0, 1.0]

    Args:
        settings: `scale_from` is the least.
        total: Steps.
        seed: Seed of the run.

    Returns:
        (total,) numbers from `scale_from` to 1.
    """
    rng = np.random.default_rng([seed, 0x5343414C])  # "SCAL"
    return settings.scale_from + (1.0 - settings.scale_from) * rng.random(total)


def sweep(settings: TrainingSettings, rates: Iterable[float]) -> list[TrainingSettings]:
    """Repeat settings at several learning rates: members of one fleet.

    >>> [settings.lr for settings in sweep(TrainingSettings(steps=10), [1e-4, 2e-4])]
    [0.0001, 0.0002]
    """
    return [replace(settings, lr=rate) for rate in rates]


def row_order(rows: int, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    """Say which row stands at each place of the training run: permutations of all rows, one after another.

    Every step takes the next `batch_size` places, so that each batch is full, across the ends of epochs too. The order
    depends on nothing but these arguments: not on the machine, on resuming, or on who else is trained beside it.

    >>> sorted(row_order(3, 6, seed=0).tolist())
    [0, 0, 1, 1, 2, 2]

    Args:
        rows: Rows there are, at least 1.
        wanted: Places to fill.
        seed: Seed of the run.

    Returns:
        (wanted,) row numbers; every row occurs once before any occurs twice.
    """
    rng = np.random.default_rng([seed, 0x524F5753])  # "ROWS": apart from any other use of the seed
    passes = [rng.permutation(rows) for _ in range(math.ceil(wanted / rows))]
    return np.concatenate([*passes, np.zeros(0, np.int64)])[:wanted].astype(np.int64)


def _check_constraint(kind: str, options: object) -> None:
    """Refuse options that the constraint does not have, or whose values it cannot use."""
    given = Record.of(
        dict(options) if isinstance(options, Mapping) else options, _WHERE, inside="constraint_options", kind=UsageError
    )
    if unknown := sorted(set(given.values) - CONSTRAINT_OPTIONS.get(kind, set())):
        raise UsageError(f"constraint {kind!r} has no option {unknown[0]!r}", where="constraint_options")
    given.number("beta", 0.0, default=1.0)
    given.number("rho", 0.0, default=1.0)
    given.integer("m", 1, default=128)
    given.flag("curvature", False)
    given.text("method", "contrastive")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _refuse(name, value, f"one of {', '.join(allowed)}")


def _within(name: str, value: float | None, low: float, high: float, *, open_below: bool = False) -> None:
    if value is not None and not (low <= value < high and not (open_below and value == low)):
        _refuse(name, value, f"a number from {low:g}{' (excluded)' if open_below else ''} to below {high:g}")


def _refuse(name: str, value: object, expected: str) -> None:
    raise UsageError(f"{name} is {shown(value)}, expected {expected}", where=_WHERE)
