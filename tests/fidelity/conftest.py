"""Tiny adapters that do something, and texts of theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.choosing import auto
from plait.choosing.auto_settings import AutoSettings
from plait.fidelity.panel import Panel, parts_of
from plait.learning import checkpoints
from plait.model.base import draw_head, head_state, load_task_model
from tests.fidelity.ended import Begun, Killed, folders_of, killed_after
from tests.tiny import WORDS, make_adapter, make_task

TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def texts_of(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple((" ".join(WORDS[w] for w in rng.integers(0, len(WORDS), rng.integers(4, 12))),) for _ in range(n))


def random_adapter(base, architecture: str, name: str, kind: str, seed: int, size: float = 0.5, classes: int = 3):
    """Random factors and a random head: the model then predicts something else than the base does."""
    task = make_task(name, kind, classes)
    start = make_adapter(base, task, architecture, rank=3, seed=seed)
    g = torch.Generator().manual_seed(seed + 50)
    modules = {m: LoraFactors(f.A, torch.randn(f.B.shape, generator=g) * size, 2.0) for m, f in start.modules.items()}
    heads = {}
    if TYPES[kind] == "SEQ_CLS":
        model = load_task_model(base, task, seed=seed)
        draw_head(model, seed)
        heads = {name: {k: v * 4 for k, v in head_state(model).items()}}
    prefix = start.prefix if heads else ""
    if not heads and start.prefix:
        modules = {f"{start.prefix}.{m}": f for m, f in modules.items()}
    return replace(start, modules=modules, heads=heads, task_type=TYPES[kind], prefix=prefix)


@pytest.fixture
def make_panel(tiny_base):
    """make_panel("bert") -> a panel of two adapters (one of three classes, one a regression; of a text model two)."""

    def make(architecture: str = "bert", kind: str = "classification", texts: int = 16, **options) -> Panel:
        base = tiny_base(architecture)
        second = "regression" if kind == "classification" else kind
        adapters = [
            random_adapter(base, architecture, "one", kind, 1),
            random_adapter(base, architecture, "two", second, 2),
        ]
        given = {a.name: texts_of(texts, i) for i, a in enumerate(adapters)}
        return Panel(base, parts_of(adapters), given, max_length=24, **options)

    return make


@pytest.fixture
def begun(make_panel, tmp_path, monkeypatch):
    """A run that was ended when its weights were learnt: called, it goes on with other settings, if any, and says what it does."""
    panel = make_panel(texts=18)
    few = AutoSettings(methods=("tsv",), scales=(0.4,), refine=2, fit=False, max_length=24)
    run = Begun(panel, folders_of(panel, tmp_path), tmp_path, few)
    monkeypatch.setattr(auto, "told", lambda *_: "about a moment")
    with monkeypatch.context() as once:
        once.setattr(checkpoints, "SHARE", 1e-9)  # the first adapter's texts, both rounds, the weights
        killed_after(once, 4)
        with pytest.raises(Killed):
            run()
    return run
