"""Which head of an adapter is meant, and what transformers' config says of it."""

from __future__ import annotations

from typing import Any

from plait.adapters.heads import REGRESSION, SINGLE_LABEL, HeadFacts, num_outputs
from plait.adapters.lora import Adapter
from plait.errors import InputError, UsageError
from plait.options import did_you_mean


def chosen_head(adapter: Adapter, task: str | None, where: str) -> str:
    """The name of the head that is asked for, or of the only one there is.

    Raises:
        UsageError: None, several, or none of that name.
    """
    known = sorted(adapter.heads)
    if not known:
        raise UsageError("it has no heads", where=where, hint="a folder of classifiers, trained or merged, has")
    if task is None and len(known) == 1:
        return known[0]
    if task is None:
        raise UsageError("which of its heads?", where=where, hint=f"one of {', '.join(known)}")
    if task not in known:
        raise UsageError(f"no head {task!r}", where=where, hint=did_you_mean(task, known))
    return task


def config_values(facts: HeadFacts, outputs: int) -> dict[str, Any]:
    """What transformers' config says of a head: classes both ways, and the kind of problem.

    Where nobody recorded the kind, one output is a regression and several are classes, as transformers itself decides.
    """
    names = facts.id2label(outputs)
    problem = facts.problem_type or (REGRESSION if outputs == 1 else SINGLE_LABEL)
    return {
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "num_labels": outputs,
        "problem_type": problem,
    }


def outputs_of(adapter: Adapter, head: str, where: str) -> int:
    """How many outputs a head has.

    Raises:
        InputError: Several of its layers could be the last.
    """
    found = num_outputs(adapter.heads[head])
    if found is None:
        layers = ", ".join(adapter.heads[head])
        raise InputError(f"which layer of the head {head!r} is its last? {layers}", where=where)
    return found
