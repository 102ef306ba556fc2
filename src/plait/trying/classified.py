"""Which class a classifier and its adapters give a text, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.errors import InputError, UsageError
from plait.evaluation.evaluate import Evaluator
from plait.fidelity.panel import Part, parts_and_refused, unlabelled
from plait.fidelity.texts import Texts, checked
from plait.fidelity.tokens import cut_said
from plait.tasks import Task
from plait.tasks.encoding import encode_counted
from plait.tasks.lengths import Cut
from plait.trying.inputs import Missing, Trial
from plait.trying.prompts import OF_TASK
from plait.trying.records import ALONE, BASE, MERGE, Answer, Asked, OnProgress, Prompts, Tried, TrySettings


def classified(
    trial: Trial, prompts: Prompts, settings: TrySettings, on_progress: OnProgress = lambda _: None
) -> Tried:
    """Ask every head the prompts for all, and those of its task.

    Args:
        trial: Who is asked.
        prompts: What they are asked; those of heads that cannot be looked at are passed over.
        settings: How.
        on_progress: Called with what is being done.

    Raises:
        UsageError: Chat, which classifiers do not read.
        InputError: No head that can be looked at; pairs and single texts mixed.
    """
    if settings.chat:
        raise UsageError("classifiers read no chat", hint="leave --chat out")
    parts, refused = parts_and_refused([trial.merge])
    everywhere = prompts.for_all
    texts = {p.name: checked((*everywhere, *prompts.of_tasks.get(p.name, ())), f"prompts of {p.name}") for p in parts}
    asked = [p for p in parts if texts[p.name]]
    if not asked:
        raise InputError(refused[0].why, where=trial.merge.name)
    evaluator = Evaluator(
        trial.base, {p.name: p.task for p in asked}, {p.name: unlabelled(texts[p.name]) for p in asked},
        settings.batch_size, settings.max_length,
    )  # fmt: skip
    own = {task: a for a in trial.adapters for task in a.heads}
    of_parts: list[list[Asked]] = []
    for part in asked:
        on_progress(f"{part.name}: {plural(len(texts[part.name]), 'text')}")
        of_parts.append(_of_part(evaluator, part, own.get(part.name), texts[part.name], trial))
    rows = [part[i] for i in range(len(everywhere)) for part in of_parts]
    rows += [row for part in of_parts for row in part[len(everywhere) :]]
    columns = (BASE, ALONE, MERGE) if trial.is_merge else (BASE, trial.merge.name)
    missing = (*trial.missing, *(Missing(one.task, one.why) for one in refused))
    notes = [
        "the bare base answers with the task's head, which was trained on an adapter's features",
        *prompts.notes,
        *cut_said({f"of {p.name}": _cut(evaluator, p, texts[p.name]) for p in asked}, settings.max_length),
    ]
    if everywhere and len(asked) > 1:
        notes.append(
            f"every head answers {plural(len(everywhere), 'prompt')}, whatever it was trained on: --prompts TASK=FILE, or a table with a "
            f"column {OF_TASK!r}, asks each its own"
        )
    return Tried(trial.merge.name, trial.base.name, columns, tuple(rows), missing, tuple(notes))


def _cut(evaluator: Evaluator, part: Part, texts: Texts) -> Cut:
    return encode_counted(evaluator.tokenizer, part.task, unlabelled(texts), evaluator.max_length)[1]


def _of_part(evaluator: Evaluator, part: Part, own: Adapter | None, texts: Texts, trial: Trial) -> list[Asked]:
    head_of = own.heads[part.name] if own is not None else part.head
    asked = [(None, part.head), *([(own, head_of)] if trial.is_merge else []), (trial.merge, part.head)]
    labels = trial.merge.classes_of(part.name) or (own.classes_of(part.name) if own is not None else None)
    found: list[list[Answer | None]] = []
    for place, (adapter, head) in enumerate(asked):
        if adapter is None and place:  # the task's adapter is not here
            found.append([None] * len(texts))
        else:
            logits = evaluator.predict(part.name, head, adapter)
            found.append([_answer(part.task, row, labels) for row in logits])
    answers = zip(*found, strict=True)
    return [Asked("\n".join(t), tuple(a), part.name) for t, a in zip(texts, answers, strict=True)]


def _answer(task: Task, logits: Any, labels: Sequence[str] | None) -> Answer:
    if task.kind == "regression" or len(logits) == 1:
        return Answer(f"{float(logits[0]):.3g}")
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    best = int(logits.argmax())
    name = labels[best] if labels and best < len(labels) else f"LABEL_{best}"
    return Answer(name, float(shifted[best] / shifted.sum()))
