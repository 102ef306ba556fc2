"""Tasks by their names, and the true scores of merges on two halves of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.evaluation.evaluate import halves, scored_labels
from plait.evaluation.scores import REPORTED, SELECTION
from plait.fidelity.panel import Panel
from plait.fidelity.score import outputs
from plait.learning.teachers import HeadLoss
from plait.tasks import GLUE_TASKS, Task, glue_task, load_task
from plait.tasks.metrics import primary, scores
from plait.tasks.task import Source

GLUE = "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte"
# Tasks beside GLUE's: their text columns and the file that is scored.
OPEN = {
    "snli": (("premise", "hypothesis"), "validation"),
    "banking77": (("sentence",), "test"),
    "clinc_domain": (("sentence",), "validation"),
}


def task_of(name: str, root: Path) -> Task:
    """One task by its name: GLUE's, or one of `OPEN`."""
    if name in GLUE_TASKS:
        return load_task(glue_task(name, root), root=root)
    columns, split = OPEN[name]
    source = Source(str(root / name / "train.parquet"), str(root / name / f"{split}.parquet"))
    return load_task(Task(name, "classification", source, columns), root=root)


class Judge:
    """True scores on the two halves of the validation rows.

    Args:
        panel: Whose base and adapters.
        tasks, validation: Name -> task, and its validation rows.
        rows: At most so many of each half of each task; 0 for all.
    """

    def __init__(self, panel: Panel, tasks, validation, rows: int) -> None:
        parts = {n: halves(len(e)) for n, e in validation.items()}
        self.halves = {}
        kept = {}
        for n, found in parts.items():
            rng = np.random.default_rng(1)
            cut = [np.sort(rng.permutation(found[h])[:rows] if rows else found[h]) for h in (SELECTION, REPORTED)]
            order = np.concatenate(cut)
            kept[n] = validation[n].take(order)
            self.halves[n] = [np.arange(len(cut[0])), np.arange(len(cut[0]), len(order))]
        self.tasks, self.rows = tasks, kept
        self.panel = panel.with_texts({n: e.texts for n, e in kept.items()})

    def scores(self, worn: Sequence[Any]) -> np.ndarray:
        """(merges, halves, tasks) scores in percent; each task may wear its own where a mapping is given."""
        found = np.zeros((len(worn), 2, len(self.panel.parts)))
        for j, part in enumerate(self.panel.parts):
            labels = scored_labels(self.tasks[part.name], self.rows[part.name])
            mine = [w[part.name] if isinstance(w, dict) else w for w in worn]
            for i, logits in enumerate(outputs(self.panel, part, mine)):
                for h, chosen in enumerate(self.halves[part.name]):
                    metrics = self.tasks[part.name].metrics
                    found[i, h, j] = primary(scores(metrics, logits[chosen], labels[chosen]))
        return found

    def labelled_loss(self, half: int, rows: int) -> tuple[Panel, HeadLoss]:
        """The labels of one half, to be learnt from."""
        chosen = {n: h[half][:rows] for n, h in self.halves.items()}
        texts = {n: self.rows[n].take(c).texts for n, c in chosen.items()}
        panel = self.panel.with_texts(texts)
        labels = {n: scored_labels(self.tasks[n], self.rows[n])[c] for n, c in chosen.items()}
        return panel, HeadLoss(panel, labels)
