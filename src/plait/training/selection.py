"""Keeping the best adapter of a run, by its score on rows that are neither trained on nor reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from plait.adapters.lora import Adapter
from plait.adapters.peft_format import read_adapter
from plait.evaluation.text import perplexity
from plait.tasks import Examples, Task, batches, encode, length_order, primary, require_positions, scores, to_device
from plait.training.peft_model import write_detached
from plait.training.record import Selected
from plait.training.settings import TrainingSettings

_HISTORY, _BEST = "scores.json", "best"


class BestAdapter(TrainerCallback):
    """Scores the adapter every so many steps, keeps the best one, and stops a run that no longer gets better.

    Args:
        settings: `evaluate_every` and `patience`.
        task: How rows are scored: its metrics, or for text minus the perplexity of the answers.
        examples: The selection rows.
        tokenizer: Tokenizer of the base.
        model: The PeftModel.
        adapter: What it was made from.
        root: Where scores and the best adapter lie while the run is unfinished.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        task: Task,
        examples: Examples,
        tokenizer: Any,
        model: Any,
        adapter: Adapter,
        root: Path,
    ) -> None:
        self.settings, self.task, self.examples, self.tokenizer = settings, task, examples, tokenizer
        self.model, self.adapter, self.root = model, adapter, root
        history = root / _HISTORY
        self.history: dict[int, float] = {}
        if history.is_file():
            self.history = {int(k): float(v) for k, v in json.loads(history.read_text(encoding="utf-8")).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score, keep, stop. A resumed run scores its steps again, to the same numbers: the run is deterministic.

        A run that no longer gets better goes on to its last snapshot, without being scored: what is chosen stays as it was.
        """
        every, step = self.settings.evaluate_every, state.global_step
        if every is None:
            return
        stalled = self._has_stalled(before=step)
        if not stalled and (step % every == 0 or step == state.max_steps):
            earlier = [v for k, v in self.history.items() if k < step]
            self.history[step] = score = self._score()
            if state.is_world_process_zero:
                if not earlier or score > max(earlier):
                    write_detached(self.root / _BEST, self.model, self.adapter)
                (self.root / _HISTORY).write_text(json.dumps(self.history), encoding="utf-8")
            stalled = self._has_stalled(before=step + 1)
        if stalled and step >= max(self.settings.snapshots, default=0):
            control.should_training_stop = True

    def _has_stalled(self, before: int) -> bool:
        """Whether `patience` evaluations before a step came after the best of them."""
        known = {k: v for k, v in self.history.items() if k < before}
        if self.settings.patience is None or not known:
            return False
        best = min(k for k, v in known.items() if v == max(known.values()))
        return sum(k > best for k in known) >= self.settings.patience

    def best(self) -> tuple[Adapter, Selected]:
        """Give the best adapter, and the record of how it was chosen."""
        step = min(k for k, v in self.history.items() if v == max(self.history.values()))
        best = read_adapter(self.root / _BEST, name=self.adapter.name)
        modules = {
            name: best.modules.get(name) or best.modules[self.adapter.full_name(name)] for name in self.adapter.modules
        }
        chosen = Selected(step, self.history[step], tuple(sorted(self.history.items())))
        return replace(self.adapter, modules=modules, heads=best.heads), chosen

    @torch.no_grad()
    def _score(self) -> float:
        training = self.model.training
        self.model.eval()
        try:
            return self._measure()
        finally:
            self.model.train(training)

    def _measure(self) -> float:
        limit, size = self.settings.max_length, self.settings.batch_size
        if self.task.kind in ("causal", "seq2seq"):
            bare = self.model.base_model.model
            return -perplexity(bare, self.tokenizer, self.task, self.examples, batch_size=size, max_length=limit)
        rows = encode(self.tokenizer, self.task, self.examples, limit)
        require_positions(self.model, (len(r["input_ids"]) for r in rows), f"task {self.task.name}")
        order, device = length_order(rows), next(self.model.parameters()).device
        parts = []
        for batch in batches(self.tokenizer, [rows[i] for i in order], size):
            inputs = to_device({k: v for k, v in batch.items() if k != "labels"}, device)
            parts.append(self.model(**inputs).logits.float().cpu().numpy())
        labels = np.asarray(self.examples.labels)[np.asarray(order)]
        return primary(scores(self.task.metrics, np.concatenate(parts), labels))
