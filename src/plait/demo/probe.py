"""The floor that the demo is honest about: what the frozen base can do with linear models on its sentence vectors, without any adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plait.disk.store import read_manifest
from plait.model.base import backbone_of
from plait.recipes.recipe import Recipe
from plait.runs.session import Session
from plait.tasks import Examples, Task, collate, encode, length_order
from plait.tasks.metrics import primary, scores

_BATCH = 64
_PENALTY = 1.0  # of both linear models, on vectors of length 1; scikit-learn's default


@dataclass(frozen=True, slots=True)
class Floor:
    """One task without adapters, beside what the demo has with them; percent.

    Args:
        task: Name.
        frozen: A linear model on the frozen base's sentence vectors, fitted until it converges on all training rows.
        alone: The task's own adapter of the arm that the best merge is of.
        merged: The best merge.
    """

    task: str
    frozen: float
    alone: float
    merged: float


def floors(recipe: Recipe, best: Path) -> list[Floor]:
    """Fit a linear model to every task of the demo on the frozen base, and put it beside the best merge.

    The sentence vector is the mean over tokens of the last layer, of length 1, as the demo's base is used for sentences;
    of a pair, both are read as one sequence, as the adapters read them.

    Args:
        recipe: The demo's.
        best: Folder of its best merge.

    Cost: one pass of the base over the training and validation rows: a few seconds.
    """
    result: Mapping[str, Any] = (read_manifest(best) or {}).get("result", {})
    session = Session(recipe)
    found = []
    for name, task in session.tasks.items():
        frozen = probe(session, task, session.training(name, 0), session.validation(name))
        found.append(Floor(name, frozen, result["scores_alone"][name], result["scores"][name]))
    return found


def probe(session: Session, task: Task, training: Examples, validation: Examples) -> float:
    """Score a linear model on the frozen base's vectors: logistic regression, ridge regression for numbers."""
    from sklearn.linear_model import LogisticRegression, Ridge

    known, asked = (_vectors(session, task, rows) for rows in (training, validation))
    if task.kind == "regression":
        predicted = Ridge(alpha=_PENALTY).fit(known, training.labels).predict(asked)[:, None]
    else:
        model = LogisticRegression(C=1 / _PENALTY, max_iter=2000).fit(known, training.labels)
        predicted = np.full((len(asked), task.num_labels), -np.inf)
        predicted[:, model.classes_] = model.predict_proba(asked)
    return primary(scores(task.metrics, predicted, validation.labels))


@torch.inference_mode()
def _vectors(session: Session, task: Task, examples: Examples) -> npt.NDArray[np.float64]:
    """(rows, width) mean token vectors of length 1."""
    evaluator = session.evaluator
    backbone: Any = backbone_of(evaluator.task_model(task.name))[0]
    rows = encode(evaluator.tokenizer, task, examples, session.recipe.data.max_length)
    order = length_order(rows)
    found = np.zeros((len(rows), backbone.config.hidden_size))
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        batch = collate(evaluator.tokenizer, [rows[i] for i in places])
        inputs = {k: v.to(session.base.torch_device) for k, v in batch.items() if k != "labels"}
        hidden = backbone(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found[places] = torch.nn.functional.normalize(mean, dim=-1).double().cpu().numpy()
    return found


def floors_text(found: list[Floor]) -> str:
    """Say what the frozen base does alone, and on which tasks that is more than an adapter here."""
    header = f"{'task':<10}{'frozen base':>12}{'adapter':>9}{'best merge':>12}"
    rows = [f"{f.task:<10}{f.frozen:>12.1f}{f.alone:>9.1f}{f.merged:>12.1f}" for f in found]
    lines = [
        header,
        *rows,
        "frozen base: a linear model on its sentence vectors, no adapter; adapter: each task's own.",
    ]
    if better := [f.task for f in found if f.frozen > f.alone]:
        lines.append(
            f"On {' and '.join(better)} it beats the adapter, which the demo trains for one short epoch: there the demo shows what merging "
            "costs, not what an adapter is for."
        )
    return "\n".join(lines)
