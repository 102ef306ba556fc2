"""Scoring adapters, alone or merged, each task with its own head, on one loaded base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.adapters.lora import Adapter
from plait.errors import RunError
from plait.evaluation.cache import Cache
from plait.evaluation.scores import REPORTED, SELECTION, Score
from plait.evaluation.text import answer_ids, choices, likelihoods, longest_answer, measured_answers
from plait.model.applied import applied
from plait.model.base import BaseModel, load_head
from plait.model.out_of_memory import by_parts
from plait.model.views import TaskModels
from plait.tasks import Examples, Task, batches, encode, length_order, primary, require_positions, scores, to_device
from plait.tasks.metrics import OPEN
from plait.tasks.task import TEXT_KINDS

Logits = npt.NDArray[np.float32]


def halves(n: int, seed: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Split n rows into a selection and a reported half, by a permutation that depends on `seed` alone.

    >>> {name: rows.tolist() for name, rows in halves(4).items()}
    {'selection': [0, 2], 'reported': [1, 3]}
    """
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
    cache: Cache = field(default_factory=Cache)
    _models: TaskModels | None = None

    @property
    def models(self) -> TaskModels:
        """The base as the model of every task."""
        self._models = self._models or TaskModels(self.base)
        return self._models

    def sharing(self, examples: Mapping[str, Examples]) -> Evaluator:
        """Make an evaluator of other rows that shares the loaded base."""
        return replace(self, examples=examples, cache=Cache(), _models=self.models)

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
            predictions = self._choices(model, task, adapter, scale, rows)
        else:
            load_head(model, head)
            encoded = self.encoded(task)
            chosen = encoded if rows is None else [encoded[i] for i in rows]
            with applied(model, adapter, scale):
                predictions = forward_logits(model, self.tokenizer, chosen, self.batch_size)
        if not np.isfinite(predictions).all():
            raise RunError(f"predictions hold NaN or infinity at scale {scale:g}", where=f"task {task}")
        return predictions

    def score_rows(self, predictions: Logits, task: str, rows: npt.NDArray[np.int64], **labels: Any) -> list[Score]:
        """Rows of the long table for predictions on these examples: every metric, and "score", their mean."""
        target = scored_labels(self.tasks[task], self.examples[task])
        metrics = scores(self.tasks[task].metrics, predictions, target[rows])
        values = {**metrics, "score": primary(metrics)}
        return [Score(task=task, metric=m, value=v, n=len(rows), **labels) for m, v in values.items()]

    def _choices(self, model: Any, task: str, adapter: Adapter | None, scale: float, rows: Any) -> Logits:
        """Log-likelihoods of a text task's answers, or what is measured of open ones."""
        if is_open(self.tasks[task]):
            examples = self.examples[task] if rows is None else self.examples[task].take(rows)
            sizes = {"batch_size": self.batch_size, "max_length": self.max_length, "new_tokens": self.new_tokens(task)}
            with applied(model, adapter, scale):
                return measured_answers(model, self.tokenizer, self.tasks[task], examples, **sizes)
        prompts, ends = self.prompts(task)
        chosen = prompts if rows is None else [prompts[int(i)] for i in rows]
        pad = self.tokenizer.pad_token_id
        with applied(model, adapter, scale):
            return likelihoods(model, self.tasks[task].kind, chosen, ends, pad, self.batch_size)

    def prompts(self, task: str) -> tuple[list[list[int]], list[list[int]]]:
        """Encode a text task's prompts and answers as token ids, once."""

        def encoded() -> tuple[list[list[int]], list[list[int]]]:
            prompts, ends = choices(self.tokenizer, self.tasks[task], self.examples[task], self.max_length)
            after = max(map(len, ends)) if self.tasks[task].kind == "causal" else 0  # elsewhere the decoder's
            require_positions(self.task_model(task), (len(p) + after for p in prompts), f"task {task}")
            return prompts, ends

        return self.cache.prompts.get(task, encoded)

    def encoded(self, task: str) -> list[dict[str, Any]]:
        """Encode a task's rows as token ids, once."""

        def encoded() -> list[dict[str, Any]]:
            rows = encode(self.tokenizer, self.tasks[task], self.examples[task], self.max_length)
            require_positions(self.task_model(task), (len(r["input_ids"]) for r in rows), f"task {task}")
            return rows

        return self.cache.rows.get(task, encoded)

    def new_tokens(self, task: str) -> int:
        """Count the tokens that a model may write after a row of a task whose answers are open, the same for all of its rows."""

        def longest() -> int:
            return longest_answer(self.tokenizer, self.tasks[task], self.encoded(task), self.examples[task])

        return self.cache.longest.get(task, longest)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.models.tokenizer

    def task_model(self, task: str) -> Any:
        """Give the model of a task; all tasks share one backbone."""
        return self.models.of(self.tasks[task])


def scored_labels(task: Task, examples: Examples) -> npt.NDArray[Any]:
    """Give (n,) class ids or values that predictions are scored against; for text, which answer is the right one, or `OPEN`."""
    if is_open(task):
        return np.full(len(examples), OPEN, np.int64)
    return answer_ids(task, examples) if task.kind in TEXT_KINDS else np.asarray(examples.labels)


def is_open(task: Task) -> bool:
    """Whether a text task's answers are open: the model writes, instead of choosing among known ones."""
    return task.kind in TEXT_KINDS and not task.labels


@torch.inference_mode()
def forward_logits(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int) -> Logits:
    """Logits of encoded rows, in their order, float32 on the CPU."""
    device = next(model.parameters()).device
    order = length_order(rows)

    def logits(part: Sequence[dict[str, Any]]) -> Tensor:
        batch = next(iter(batches(tokenizer, list(part), len(part))))
        inputs = to_device({k: v for k, v in batch.items() if k != "labels"}, device)
        values: Tensor = model(**inputs).logits.float()
        return values

    parts = by_parts(logits, [rows[i] for i in order], batch_size, "scored")
    joined = torch.cat(parts).cpu().numpy()
    in_order = np.empty_like(joined)
    in_order[np.asarray(order)] = joined
    return in_order
