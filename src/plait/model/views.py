"""One base as the model of every task: loaded once, the backbone shared, a head for each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from plait.model.base import BaseModel, backbone_of, head_modules, load_task_model, load_tokenizer
from plait.model.parts import begin_head
from plait.tasks.task import TEXT_KINDS, Task


class TaskModels:
    """A base that is loaded when it is first asked for.

    Args:
        base: The base model.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._tokenizer: Any = None
        self._model: Any = None
        self._views: dict[str, Any] = {}

    @property
    def loaded(self) -> bool:
        """Whether the base's weights are in memory."""
        return self._model is not None

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        self._tokenizer = self._tokenizer or load_tokenizer(self.base)
        return self._tokenizer

    def of(self, task: Task) -> Any:
        """Give a task's model; all tasks share one backbone."""
        if self._model is None:
            self._model = load_task_model(self.base, task, seed=0)
        if task.name not in self._views:
            self._views[task.name] = task_view(self._model, task)
        return self._views[task.name]


def task_view(model: nn.Module, task: Task) -> nn.Module:
    """Make a model for another task that shares this one's backbone; only its head is new.

    Its linear layers hold no values yet (`draw_head`, `load_head`); its norms have the base's.
    """
    backbone, prefix = backbone_of(model)
    if not prefix or task.kind in TEXT_KINDS:
        return model
    config: Any = copy.deepcopy(model.config)
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    with torch.device("meta"):
        view: nn.Module = type(model)(config)
    setattr(view, prefix, backbone)
    like = next(backbone.parameters())
    for name in head_modules(view):
        getattr(view, name).to_empty(device=like.device).to(like.dtype)
    begin_head(view, model)
    return view.eval()
