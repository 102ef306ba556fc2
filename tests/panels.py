"""Panels of tiny adapters that do something: adapters, texts, folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from plait.adapters.lora import LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.model.base import draw_head, head_state, load_task_model
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


def adapters_of(panel):
    return [p.adapter for p in panel.parts]


def same(a, b):
    return a.modules.keys() == b.modules.keys() and all(
        torch.equal(f.A, b.modules[m].A) and torch.equal(f.B, b.modules[m].B) and f.scaling == b.modules[m].scaling
        for m, f in a.modules.items()
    )


def folders_of(panel, root: Path) -> list[str]:
    made = []
    for part in panel.parts:
        folder = root / part.name
        folder.mkdir()
        write_adapter(folder, part.adapter)
        made.append(str(folder))
    return made


def text_file(panel, task: str, root: Path) -> str:
    path = root / f"{task}.txt"
    path.write_text("".join("\t".join(t) + "\n" for t in panel.texts[task]))
    return f"{task}={path}"
