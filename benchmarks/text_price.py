"""What adapters and their merges cost outside their tasks: tasks that nobody trained, and the perplexity of general text.

`text_arms.py --do price:SEED` calls `price` for each arm; `--elsewhere STUDY.yaml:TASK,TASK` names the tasks and where they are described.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy

from plait.adapters.lora import Adapter
from plait.model.applied import applied
from plait.recipes.recipe_file import read_recipe
from plait.runs.layout import Layout
from plait.runs.stages import splits

Worn = tuple[Adapter | None, float]
Scored = Callable[[Layout, Sequence[Worn], Mapping[str, Mapping[str, Any]]], np.ndarray]
BARE: Worn = (None, 0.0)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Tasks that no adapter of a run was trained on.

    Args:
        layout: Of a study of them alone, on the run's base.
        rows: Task -> half -> rows.
    """

    layout: Layout
    rows: Mapping[str, Mapping[str, Any]]


def elsewhere_of(place: str, settings: Sequence[str], trained: Sequence[str], out: Path, rows: int) -> Elsewhere:
    """Read the tasks of STUDY.yaml:TASK,TASK.

    Args:
        place: As it is given.
        settings: KEY=VALUE of the run's study, of which base, data and rows count here too.
        trained: The run's own tasks.
        out: The run's folder.
        rows: Reported rows of each half.
    """
    study, _, names = place.partition(":")
    wanted = names.split(",")
    if both := sorted(set(wanted) & set(trained)):
        raise SystemExit(f"--elsewhere: trained here: {', '.join(both)}")
    known = {t["name"]: t for t in yaml.safe_load(Path(study).read_text())["tasks"]}
    if missing := [n for n in wanted if n not in known]:
        raise SystemExit(f"--elsewhere: {study} has no task {', '.join(missing)}")
    tasks = json.dumps([known[n] for n in wanted])
    layout = Layout(read_recipe(Path(study), [*settings, f"tasks={tasks}", "arms=[kaiming]"]), out)
    halves = {t: {h: r[:rows] for h, r in s.halves.items()} for t, s in splits(layout).items()}
    return Elsewhere(layout, halves)


@torch.inference_mode()
def perplexities(
    model: Any, tokenizer: Any, texts: Sequence[str], worn: Sequence[Worn], length: int = 96
) -> list[float]:
    """Exponential of the mean loss of the texts' tokens after the first, with each adapter at its scale; (None, 0) is the bare model."""
    device, rows = (
        next(model.parameters()).device,
        [tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts],
    )
    found = []
    for adapter, scale in worn:
        loss, count = 0.0, 0
        with applied(model, adapter, scale):
            for start in range(0, len(rows), 32):
                part = [r for r in rows[start : start + 32] if len(r) > 1]
                width = max(map(len, part), default=0)
                if not width:
                    continue
                ids = torch.tensor([r + [0] * (width - len(r)) for r in part], device=device)
                mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in part], device=device)
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                right = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
                loss += float(cross_entropy(logits.flatten(0, 1), right.flatten(), ignore_index=-100, reduction="sum"))
                count += int(mask[:, 1:].sum())
        found.append(math.exp(loss / max(1, count)))
    return found


def price(
    alone: Mapping[str, Adapter], merges: Mapping[str, Worn], elsewhere: Elsewhere, texts: Sequence[str],
    scored: Scored, kl: Callable[[Sequence[Worn]], Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """Scores of tasks that nobody trained, perplexity and KL of general text: of the bare base, of each adapter and of each merge.

    Args:
        alone: Task -> its adapter.
        merges: Name -> merge at its scale.
        elsewhere: The other tasks.
        texts: General texts.
        scored: (layout, worn, rows) -> (worn, halves, tasks) scores.
        kl: Worn -> KL(base || worn) a token on the general texts.
    """
    named: dict[str, Worn] = {"": BARE, **{f"alone: {t}": (a, 1.0) for t, a in alone.items()}, **merges}
    worn = list(named.values())
    elsewhere.layout.session.load()
    evaluator = elsewhere.layout.session.evaluator
    tasks = list(evaluator.tasks)
    table = scored(elsewhere.layout, worn, elsewhere.rows)
    told = perplexities(evaluator.task_model(tasks[0]), evaluator.tokenizer, texts, worn)
    shifts = [0.0, *kl(worn[1:])]
    rows = {
        name: {
            "scores": table[i].mean(0).round(3).tolist(),
            "perplexity": round(told[i], 4),
            "general_kl": float(shifts[i]),
        }
        for i, name in enumerate(named)
    }
    n = 1 + len(alone)
    each = list(rows.items())
    return {
        "tasks": tasks, "base": each[0][1],
        "alone": {k.removeprefix("alone: "): v for k, v in each[1:n]}, "merges": dict(each[n:]),
    }  # fmt: skip
