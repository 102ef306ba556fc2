"""The HF Trainer with plait's row order, schedule, losses and checkpoints. Imports transformers: import it late."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from plait.errors import EnvironmentFault, RunError, UsageError
from plait.model.base import BaseModel
from plait.tasks.task import Task
from plait.training.checkpoints import run_name, seal
from plait.training.losses import task_loss
from plait.training.settings import TrainingSettings, row_order


class RowOrder(Sampler[int]):
    """Row numbers in the order of `row_order`."""

    def __init__(self, order: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


class TaskTrainer(Trainer):
    """Trains one adapter. See `plait.training.train.train_adapter`."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, task: Task, settings: TrainingSettings, rows: list[dict[str, Any]], **options: Any) -> None:
        self.task, self.settings, self.rows = task, settings, len(rows)
        self._staging: Path | None = None
        super().__init__(train_dataset=rows, **options)
        self.model_accepts_loss_kwargs = True  # asks for the number of labelled items of the whole step

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.rows
        wanted = self.settings.total_steps(rows) * self.settings.batch_size
        return RowOrder(row_order(rows, wanted, self.args.seed))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; the head may have its own rate, and vectors are not decayed."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameter_groups(model or self.model, self.settings))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the settings' schedule."""
        if self.lr_scheduler is None:
            total = num_training_steps
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda s: self.settings.factor(s, total))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the task's loss over the rows (or labelled tokens) of the whole step."""
        labels: Tensor = inputs["labels"]
        seen = inputs if self.task.kind == "seq2seq" else {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**seen)
        loss = task_loss(self.task.kind, outputs.logits, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is of all processes
        return (loss, outputs) if return_outputs else loss

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint apart and rename it into place whole: a killed run leaves no half of one."""
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = root / "staging"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(root / "staging" / name, root / name)
        self.accelerator.wait_for_everyone()


def parameter_groups(model: Any, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: (factors, head) x (matrices with weight decay, vectors without)."""
    head_rate = settings.lr if settings.head_lr is None else settings.head_lr
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = settings.lr if ".lora_" in name else head_rate
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that the Trainer does not know or that are not installed, before it is made."""
    from transformers.integrations import integration_utils

    known: Any = integration_utils
    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            hint = f"one of {', '.join(sorted(known.INTEGRATION_TO_CALLBACK))}"
            raise UsageError(f"unknown tracker {name!r}", where="training.report_to", hint=hint)
        if name not in known.get_available_reporting_integrations():
            raise EnvironmentFault(
                f"{name} is not installed", where="training.report_to", hint="install it, or leave it out"
            )


def training_arguments(settings: TrainingSettings, total: int, seed: int, root: Path, base: BaseModel) -> Any:
    """TrainingArguments: quiet, reproducible, nothing sent anywhere unless `report_to` says so."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % (world * settings.accumulation):
        raise RunError(
            f"batch_size {settings.batch_size} is no multiple of {world} processes x {settings.accumulation} passes"
        )
    _require_trackers(settings.report_to)
    device, half = base.torch_device, base.torch_dtype != torch.float32
    saves = settings.checkpoint_every is not None
    arguments = TrainingArguments(
        output_dir=str(root),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size // (world * settings.accumulation),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16" or half,  # factors and head are float32 beside a half-precision base
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_strategy="steps",
        logging_steps=max(1, total // 20),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=settings.checkpoint_every or total,
        report_to=list(settings.report_to) or "none",
        run_name=run_name(root),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False if world > 1 else None,
        ddp_backend="gloo" if world > 1 and device.type == "cpu" else None,
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # several visible GPUs without torchrun would mean DataParallel
    return arguments
