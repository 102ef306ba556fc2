"""Scoring adapters, alone or merged, each task with its own head, on one loaded base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter
from plait.errors import RunError
from plait.evaluation.scores import REPORTED, SELECTION, Score
from plait.evaluation.text import answer_ids, choices, likelihoods, measured_answers
from plait.model.applied import applied
from plait.model.base import BaseModel, backbone_of, head_modules, load_head, load_task_model, load_tokenizer
from plait.model.out_of_memory import by_parts
from plait.tasks import Examples, Task, batches, encode, length_order, primary, require_positions, scores, to_device
from plait.tasks.metrics import OPEN
from plait.tasks.task import TEXT_KINDS

Logits = npt.NDArray[np.float32]


def halves(n: int, seed: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Split n rows into a selection and a reported half, by a permutation that depends on `seed` alone."""
    order = np.random.default_rng(seed).permutation(n)
    return {SELECTION: np.sort(order[: n // 2]), REPORTED: np.sort(order[n // 2 :])}


@dataclass(slots=True)
class Evaluator:
    """One base, loaded once, that predicts any task with any adapter.

    Args:
        base: The base model.
        tasks: Name -> task.
        examples: Name -> validation rows.
        batch_size: Rows per forward pass; rows are sorted by length, so a batch holds few pads.
        max_length: Tokens per row.
    """

    base: BaseModel
    tasks: Mapping[str, Task]
    examples: Mapping[str, Examples]
    batch_size: int = 64
    max_length: int = 128
    _tokenizer: Any = None
    _model: Any = None
    _rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _views: dict[str, Any] = field(default_factory=dict)
    _banks: dict[Any, Any] = field(default_factory=dict)
    _stacks: dict[Any, Any] = field(default_factory=dict)
    _choices_of: dict[str, tuple[list[list[int]], list[list[int]]]] = field(default_factory=dict)

    def predict(
        self,
        task: str,
        head: Mapping[str, Tensor],
        adapter: Adapter | None = None,
        scale: float = 1.0,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Logits:
        """Logits (n, classes), or (n, 1) for regression, in the order of the examples (of `rows`, where given).

        Raises:
            RunError: A prediction is NaN or infinite.
        """
        model = self.task_model(task)
        if self.tasks[task].kind in TEXT_KINDS:
            found = self._choices(model, task, adapter, scale, rows)
        else:
            load_head(model, head)
            encoded = self._encoded(task)
            chosen = encoded if rows is None else [encoded[i] for i in rows]
            with applied(model, adapter, scale):
                found = forward_logits(model, self.tokenizer, chosen, self.batch_size)
        if not np.isfinite(found).all():
            raise RunError(f"predictions hold NaN or infinity at scale {scale:g}", where=f"task {task}")
        return found

    def score_rows(self, predictions: Logits, task: str, rows: npt.NDArray[np.int64], **labels: Any) -> list[Score]:
        """Rows of the long table for predictions on these examples: every metric, and "score", their mean."""
        target = scored_labels(self.tasks[task], self.examples[task])
        found = scores(self.tasks[task].metrics, predictions, target[rows])
        values = {**found, "score": primary(found)}
        return [Score(task=task, metric=m, value=v, n=len(rows), **labels) for m, v in values.items()]

    def _choices(self, model: Any, task: str, adapter: Adapter | None, scale: float, rows: Any) -> Logits:
        """Log-likelihoods of a text task's answers, or what is measured of open ones."""
        if is_open(self.tasks[task]):
            examples = self.examples[task] if rows is None else self.examples[task].take(rows)
            sizes = {"batch_size": self.batch_size, "max_length": self.max_length}
            with applied(model, adapter, scale):
                return measured_answers(model, self.tokenizer, self.tasks[task], examples, **sizes)
        prompts, ends = self._prompts(task)
        chosen = prompts if rows is None else [prompts[int(i)] for i in rows]
        pad = self.tokenizer.pad_token_id
        with applied(model, adapter, scale):
            return likelihoods(model, self.tasks[task].kind, chosen, ends, pad, self.batch_size)

    def _prompts(self, task: str) -> tuple[list[list[int]], list[list[int]]]:
        """A text task's prompts and answers as token ids."""
        if task not in self._choices_of:
            found = choices(self.tokenizer, self.tasks[task], self.examples[task], self.max_length)
            after = max(map(len, found[1])) if self.tasks[task].kind == "causal" else 0  # elsewhere the decoder's
            require_positions(self.task_model(task), (len(p) + after for p in found[0]), f"task {task}")
            self._choices_of[task] = found
        return self._choices_of[task]

    def _encoded(self, task: str) -> list[dict[str, Any]]:
        if task not in self._rows:
            found = encode(self.tokenizer, self.tasks[task], self.examples[task], self.max_length)
            require_positions(self.task_model(task), (len(r["input_ids"]) for r in found), f"task {task}")
            self._rows[task] = found
        return self._rows[task]

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        self._tokenizer = self._tokenizer or load_tokenizer(self.base)
        return self._tokenizer

    def task_model(self, task: str) -> Any:
        """The model of a task; all tasks share one backbone."""
        if self._model is None:
            self._model = load_task_model(self.base, self.tasks[task], seed=0)
        if task not in self._views:
            self._views[task] = task_view(self._model, self.tasks[task])
        return self._views[task]


def scored_labels(task: Task, examples: Examples) -> npt.NDArray[Any]:
    """(n,) class ids or values that predictions are scored against; for text, which answer is the right one, or `OPEN`."""
    if is_open(task):
        return np.full(len(examples), OPEN, np.int64)
    return answer_ids(task, examples) if task.kind in TEXT_KINDS else np.asarray(examples.labels)


def is_open(task: Task) -> bool:
    """Whether a text task's answers are open: the model writes, instead of choosing among known ones."""
    return task.kind in TEXT_KINDS and not task.labels


def task_view(model: nn.Module, task: Task) -> nn.Module:
    """A model for another task that shares this one's backbone: only the head is new (and holds no values yet)."""
    backbone, prefix = backbone_of(model)
    if not prefix or task.kind in TEXT_KINDS:
        return model
    config: Any = copy.deepcopy(model.config)
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    with torch.device("meta"):
        view = type(model)(config)  # type: ignore[call-arg, arg-type]
    setattr(view, prefix, backbone)
    like = next(backbone.parameters())
    for name in head_modules(view):
        getattr(view, name).to_empty(device=like.device).to(like.dtype)
    return view.eval()


@torch.inference_mode()
def forward_logits(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int) -> Logits:
    """Logits of encoded rows, in their order, float32 on the CPU."""
    device = next(model.parameters()).device
    order = length_order(rows)

    def logits(part: Sequence[dict[str, Any]]) -> Tensor:
        batch = next(iter(batches(tokenizer, list(part), len(part))))
        inputs = to_device({k: v for k, v in batch.items() if k != "labels"}, device)
        found: Tensor = model(**inputs).logits.float()
        return found

    parts = by_parts(logits, [rows[i] for i in order], batch_size, "scored")
    joined = torch.cat(parts).cpu().numpy()
    found = np.empty_like(joined)
    found[np.asarray(order)] = joined
    return found
