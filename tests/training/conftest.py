"""Tiny bases, tasks and initial adapters for training tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.model.base import BaseModel, backbone_of, load_task_model
from plait.tasks import Examples, Source, Task
from tests.tiny import TARGETS, WORDS, save_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """tiny_base("bert") -> BaseModel of a saved tiny model."""
    root = tmp_path_factory.mktemp("bases")

    def get(architecture: str, **options) -> BaseModel:
        folder = root / architecture
        if not folder.exists():
            save_model(folder, architecture)
        return BaseModel(str(folder), device="cpu", **options)

    return get


def make_task(name: str = "topic", kind: str = "classification", classes: int = 2) -> Task:
    labels = tuple(f"c{i}" for i in range(classes)) if kind == "classification" else None
    metrics = {"classification": ("accuracy",), "regression": ("pearson",)}.get(kind, ("exact_match",))
    return Task(name, kind, Source("none"), ("text",), labels=labels, metrics=metrics)


def make_examples(task: Task, rows: int = 48, seed: int = 0) -> Examples:
    """Rows whose label is decided by which words occur: learnable."""
    rng = np.random.default_rng(seed)
    classes = len(task.labels) if task.labels else 2
    targets = rng.integers(0, classes, rows)
    texts = []
    for target in targets:
        words = rng.integers(10, len(WORDS), rng.integers(3, 12))
        texts.append((" ".join([WORDS[target], *(WORDS[w] for w in words), WORDS[target]]),))
    if task.kind == "classification":
        labels = targets.astype(np.int64)
    elif task.kind == "regression":
        labels = targets.astype(np.float32)
    else:
        labels = tuple(f"{WORDS[t]} {WORDS[t + 3]}" for t in targets)
    return Examples(tuple(texts), labels, np.arange(rows))


def make_adapter(base: BaseModel, task: Task, architecture: str, rank: int = 4, seed: int = 0) -> Adapter:
    """Random A, B = 0, on the architecture's usual targets."""
    backbone, prefix = backbone_of(load_task_model(base, task, seed=0))
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in backbone.named_modules():
        if name.endswith(TARGETS[architecture]) and hasattr(module, "weight"):
            n_out, n_in = module.weight.shape if architecture != "gpt2" else module.weight.shape[::-1]
            A = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            modules[name] = LoraFactors(A, torch.zeros(n_out, rank), 2.0)
    return Adapter(
        task.name,
        base.name,
        modules,
        prefix=prefix,
        target_modules=TARGETS[architecture],
        fan_in_fan_out=architecture == "gpt2",
    )
