"""What `data.max_length` cuts of a recipe's rows: counted by the tokenizer alone, and said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from plait.model.base import load_tokenizer
from plait.progress import note
from plait.runs.session import Session
from plait.tasks import Examples, Task
from plait.tasks.encoding import encode_counted
from plait.tasks.lengths import Cut
from plait.tasks.task import TEXT_KINDS

COUNTED = 1000  # rows of a task and split that are looked at: a second or less, and a share to 3 points (95 %)
_DRAW = 0x435554  # "CUT": apart from other draws
Cuts = Mapping[str, Mapping[str, Cut]]


def cuts_of(session: Session, seed: int) -> Cuts:
    """Count, for each task and split, the rows that are longer than `data.max_length`.

    Args:
        session: Base, data and tasks.
        seed: Seed of the training rows.

    Returns:
        Task -> split ("train", "validation") -> what is cut; of more than `COUNTED` rows a sample's.

    Raises:
        InputError: An answer of a causal task that does not fit.

    Cost: tokenises the rows; no model is loaded.
    """
    rows = {t: {"train": session.training(t, seed), "validation": session.validation(t)} for t in session.tasks}
    return {
        t: {split: cut_of_rows(session, t, examples, scored=split == "validation") for split, examples in both.items()}
        for t, both in rows.items()
    }


def cut_of_rows(session: Session, task: str, examples: Examples, *, scored: bool) -> Cut:
    """Count the rows of one task that are longer than `data.max_length`.

    Args:
        session: Base, data and tasks.
        task: The task's name.
        examples: Its rows; of more than `COUNTED` a sample is looked at.
        scored: Whether answers that are known are chosen among: then the longest has to fit after every prompt.

    Raises:
        InputError: An answer of a causal task that does not fit.
    """
    tokenizer, spec, total = load_tokenizer(session.base), session.tasks[task], len(examples)
    if total > COUNTED:
        examples = examples.take(np.sort(np.random.default_rng(_DRAW).permutation(total)[:COUNTED]))
    if scored and spec.labels and spec.kind in TEXT_KINDS:
        longest = max(spec.labels, key=lambda a: len(tokenizer(" " + a)["input_ids"]))
        examples = replace(examples, labels=(longest,) * len(examples))
    cut = encode_counted(tokenizer, spec, examples, session.recipe.data.max_length)[1]
    return replace(cut, total=total) if total > COUNTED else cut


def sentences(cuts: Cuts, tasks: Mapping[str, Task]) -> list[str]:
    """Say what is cut, a line for each task and split of which anything is."""
    return [
        said + (" (training rows)" if split == "train" else " (validation rows)")
        for task, splits in cuts.items()
        for split, cut in splits.items()
        if (said := cut.said(tasks[task]))
    ]


def without_whole(cuts: Cuts) -> Cuts:
    """Leave out what nothing is cut of."""
    shorter = {task: {split: cut for split, cut in both.items() if cut.cut} for task, both in cuts.items()}
    return {task: both for task, both in shorter.items() if both}


def say(cuts: Cuts, tasks: Mapping[str, Task]) -> None:
    """Note what is cut on stderr."""
    for sentence in sentences(cuts, tasks):
        note(sentence)


def say_of_rows(session: Session, task: str, examples: Examples, *, split: str) -> Cut:
    """Count what is cut of one task's rows, and note it on stderr."""
    cut = cut_of_rows(session, task, examples, scored=split == "validation")
    say({task: {split: cut}}, session.tasks)
    return cut
