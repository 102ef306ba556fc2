"""What a task's head says beside its weights: names of classes, kind of problem, and the model it belongs on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.border.counts import plural
from plait.border.head_shapes import output_layer
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "head"  # key in the metadata of the file that holds a head's tensors
REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"
PROBLEM_TYPES = (REGRESSION, SINGLE_LABEL, MULTI_LABEL)
_PROBLEMS = {"regression": REGRESSION, "classification": SINGLE_LABEL}  # by the kinds of plait's tasks
_TEXT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What the outputs of one head mean; every field is None (or "") where nobody recorded it.

    Args:
        labels: Names of the classes, in the order of the outputs.
        problem_type: As transformers' configs have it: "regression", "single_label_classification" or
            "multi_label_classification".
        task_type: PEFT's, of the model that the head belongs on, such as "SEQ_CLS".
        prefix: Attribute of the backbone in that model ("bert").
    """

    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    task_type: str | None = None
    prefix: str = ""

    def to_json(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """As a JSON object, with the number of outputs where the head's tensors tell it."""
        found = {
            "labels": list(self.labels) if self.labels else None,
            "num_labels": num_outputs(tensors or {}),
            "problem_type": self.problem_type,
            "task_type": self.task_type,
            "prefix": self.prefix or None,
        }
        return {k: v for k, v in found.items() if v is not None}

    def otherwise(self, other: HeadFacts) -> HeadFacts:
        """These facts, completed by another's where they know nothing."""
        return HeadFacts(
            self.labels or other.labels,
            self.problem_type or other.problem_type,
            self.task_type or other.task_type,
            self.prefix or other.prefix,
        )

    def id2label(self, outputs: int) -> dict[int, str]:
        """Number of an output -> its name; transformers' own ``LABEL_0`` where none is known."""
        return dict(enumerate(self.labels)) if self.labels else {i: f"LABEL_{i}" for i in range(outputs)}


def head_metadata(facts: HeadFacts, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file that holds this head; {} where nothing is known of it."""
    known = facts.to_json()
    return {HEAD: json.dumps(facts.to_json(tensors), sort_keys=True, ensure_ascii=True)} if known else {}


def read_facts(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: str) -> HeadFacts:
    """The facts in the metadata of a head's file; empty ones where it has none.

    Raises:
        InputError: They are no such facts, or name another number of classes than the head has outputs.
    """
    text = metadata.get(HEAD)
    if text is None:
        return HeadFacts()
    try:
        raw = json.loads(text) if len(text) <= _TEXT_LIMIT else None
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise InputError(f"{HEAD!r} in its metadata is no JSON object", where=where)
    return checked_facts(raw, num_outputs(tensors), where)


def checked_facts(raw: Mapping[str, Any], outputs: int | None, where: str) -> HeadFacts:
    """Facts from a JSON object, types and number of classes checked; raises as `read_facts`."""
    labels = raw.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise InputError(f"labels of its head are {labels!r:.80}, expected a list of names", where=where)
    if labels and outputs is not None and len(labels) != outputs:
        raise InputError(
            f"its head has {plural(outputs, 'output')} and {plural(len(labels), 'name')} of classes", where=where
        )
    for key in ("problem_type", "task_type", "prefix"):
        if not isinstance(raw.get(key, ""), str):
            raise InputError(f"{key} of its head is {raw[key]!r:.80}, expected a string", where=where)
    if (problem := raw.get("problem_type")) is not None and problem not in PROBLEM_TYPES:
        raise InputError(
            f"problem_type of its head is {problem!r:.80}, expected {', '.join(PROBLEM_TYPES)}", where=where
        )
    return HeadFacts(tuple(labels) if labels else None, problem, raw.get("task_type"), raw.get("prefix", ""))


def recorded_facts(result: Mapping[str, Any], head: str, own: str) -> HeadFacts:
    """What the record of a trained adapter or of a merge tells of a head; classes aside, which `Adapter.classes_of` finds.

    Args:
        result: `result` of the folder's manifest.
        head: Name of the head.
        own: Name of the adapter, which a trained one's only head has too.
    """
    inputs = result.get("adapters")
    found = [a for a in inputs if isinstance(a, dict) and a.get("name") == head] if isinstance(inputs, list) else []
    one = found[0] if found else result if head == own and not inputs else {}
    kind, task_type, prefix = (one.get(k) for k in ("kind", "task_type", "prefix"))
    prefix = prefix or one.get("backbone_prefix")
    return HeadFacts(
        problem_type=_PROBLEMS.get(kind) if isinstance(kind, str) else None,
        task_type=task_type if isinstance(task_type, str) else None,
        prefix=prefix if isinstance(prefix, str) else "",
    )


def facts_of_task(kind: str, labels: tuple[str, ...] | None) -> HeadFacts:
    """The facts of a head that plait trains on a task of this kind."""
    return HeadFacts(tuple(labels) if labels and kind != REGRESSION else None, _PROBLEMS.get(kind))


def num_outputs(tensors: Mapping[str, Tensor]) -> int | None:
    """How many outputs a head has; None where its tensors do not tell."""
    name = output_layer({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return int(tensors[name].shape[0]) if name else None
