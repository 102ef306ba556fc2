"""What plait does inside somebody's HF Trainer or TRL trainer. Imports transformers: import it late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from plait.adapters.lora import Adapter
from plait.errors import Diverged
from plait.training.constraints import Constraint, attach_constraint, freeze_rows
from plait.training.member import Progress
from plait.training.peft_model import write_detached


class ConstraintCallback(TrainerCallback):
    """Keeps a constraint while any HF Trainer, TRL's included, trains a PeftModel.

    Args:
        constraint: From `plait.training.prepare_constraint`.
        model: The PeftModel; needed for "frozen" where processes are several, to freeze before DDP looks.
    """

    def __init__(self, constraint: Constraint, model: Any = None) -> None:
        self.constraint = constraint
        self._remove: Callable[[], None] | None = None
        if model is not None and constraint.kind == "frozen":
            freeze_rows(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Hang the constraint on the optimiser that the trainer has made."""
        self._remove = attach_constraint(given["optimizer"], given["model"], self.constraint)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take it off."""
        if self._remove is not None:
            self._remove()


class DrawnScales(TrainerCallback):
    """Scales the update by another number in every step; between steps it is what it is.

    Args:
        scales: One number a step, from `plait.training.settings.scale_order`.
        model: The PeftModel, its adapter named default.
    """

    def __init__(self, scales: Sequence[float], model: Any) -> None:
        from peft.tuners.lora import LoraLayer

        self.scales = scales
        self.layers: list[tuple[Any, float]] = [
            (m, m.scaling["default"]) for m in model.modules() if isinstance(m, LoraLayer)
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Scale it for all passes of the step."""
        self._set(self.scales[state.global_step])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put it back: whoever looks at the adapter after a step sees it whole."""
        self._set(1.0)

    def _set(self, scale: float) -> None:
        for layer, scaling in self.layers:
            layer.scaling["default"] = scaling * scale


class Snapshots(TrainerCallback):
    """Keeps the adapter as it is after some steps.

    Args:
        steps: After which.
        root: Folder; each goes into ``steps/NNNNNN`` there.
        model: The PeftModel.
        adapter: What it was made from.
    """

    def __init__(self, steps: tuple[int, ...], root: Path, model: Any, adapter: Adapter) -> None:
        self.steps, self.root, self.model, self.adapter = set(steps), root / "steps", model, adapter

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write one, whole."""
        if state.global_step in self.steps and state.is_world_process_zero:
            write_detached(self.root / f"{state.global_step:06d}", self.model, self.adapter)


class Watcher(TrainerCallback):
    """Collects losses, reports progress, and stops a run whose loss is no number."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.losses: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a step."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.losses[-1][1] if self.losses else None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Keep a logged loss."""
        loss = (logs or {}).get("loss")
        if loss is not None:
            if not np.isfinite(loss):
                raise Diverged(
                    f"the loss is {loss} at step {state.global_step}", hint="lower the learning rate, or use fp32"
                )
            self.losses.append((int(state.global_step), float(loss)))
