"""A task's head out of an adapter folder, put into a model of transformers together with what its outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapters.head_config import chosen_head, config_values
from plait.adapters.heads import HeadFacts, num_outputs
from plait.adapters.lora import of_backbone
from plait.adapters.peft_format import read_adapter
from plait.border.counts import plural
from plait.errors import InputError

_BEFORE = "_plait_before"  # attribute of a model: what stood in its backbone before a head brought layers of its own
# PEFT's task type -> ending of the classes of transformers that such heads belong in.
CLASS_OF = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def load_head(model: nn.Module, folder: str | Path, task: str | None = None) -> HeadFacts:
    """Put a task's head into a classifier, and the names of its classes into the classifier's config.

    Layers of the backbone that the adapter trained whole beside its head (a pooler) go in with it, and out again with the next head.

    Args:
        model: From ``AutoModelForSequenceClassification.from_pretrained(base, num_labels=...)``, with as many outputs as the
            head has, bare or as the base of a PeftModel; changed in place.
        folder: A merge, or a trained adapter.
        task: Which of its heads; may be left out where it has one.

    Returns:
        What is known of the head: `id2label`, `label2id`, `num_labels` and `problem_type` of the config follow it.

    Raises:
        UsageError: The folder has no such head; those that it has are named.
        InputError: The head is of another model or class of model, or of another number of outputs.
    """
    adapter = read_adapter(folder)
    name = chosen_head(adapter, task, str(folder))
    wrapped: Any = model
    own: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    head, facts = adapter.heads[name], adapter.facts_of(name)
    outputs = num_outputs(head)
    config = getattr(own, "config", None)
    if outputs is not None and config is not None and getattr(config, "num_labels", outputs) != outputs:
        raise InputError(
            f"the head {name!r} has {plural(outputs, 'output')}, the model {config.num_labels}",
            where=str(folder),
            hint=f"from_pretrained(..., num_labels={outputs})",
        )
    _require_class(type(own).__name__, facts, name, str(folder))
    _put(own, head)
    if config is not None and outputs is not None:
        for key, value in config_values(facts, outputs).items():
            setattr(config, key, value)
    return facts


def _require_class(given: str, facts: HeadFacts, name: str, folder: str) -> None:
    """Refuse a class of transformers for another task: a token classifier's head has the shapes of a text classifier's."""
    wanted = CLASS_OF.get(facts.task_type or "", "")
    if wanted and not given.endswith(wanted) and given.endswith(tuple(CLASS_OF.values())):
        raise InputError(
            f"the head {name!r} is for a model {wanted}, this is {given}", where=folder, hint=f"AutoModel{wanted}"
        )


def _put(own: Any, head: Mapping[str, Tensor]) -> None:
    """Put a head where a classifier runs it: in its own module, or in PEFT's copies of it (`modules_to_save`)."""
    from plait.model.base import backbone_of, head_modules, load_head

    prefix = backbone_of(own)[1]
    _put_inside(own, {k: t for k, t in head.items() if of_backbone(prefix, k)})
    head = {k: t for k, t in head.items() if not of_backbone(prefix, k)}
    wrappers = {n: m for n in head_modules(own) if hasattr(m := own.get_submodule(n), "modules_to_save")}
    adapters = {a for m in wrappers.values() for a in m.modules_to_save}
    try:
        for adapter in sorted(adapters) or [None]:
            for name, wrapper in wrappers.items():
                setattr(own, name, wrapper.modules_to_save[adapter])
            load_head(own, head)
    finally:
        for name, wrapper in wrappers.items():
            setattr(own, name, wrapper)


def _put_inside(own: Any, whole: Mapping[str, Tensor]) -> None:
    """Put layers of the backbone that were trained whole beside a head, a pooler, where they run; those of another head go out first.

    Raises:
        InputError: The model has no such layer, or one of another shape.
    """
    before: dict[str, tuple[Tensor, Tensor]] = own.__dict__.setdefault(_BEFORE, {})
    places: dict[str, Tensor] = {}
    for key, tensor in whole.items():
        name, _, last = key.rpartition(".")
        try:
            module: Any = own.get_submodule(name)
            copies = list(getattr(module, "modules_to_save", {}).values()) or [module]
            places[key] = getattr(copies[0], last)
        except AttributeError:
            raise InputError("no such layer in the model, whose head was trained with it", where=key) from None
        if places[key].shape != tensor.shape:
            raise InputError(
                f"head tensor is {tuple(tensor.shape)}, the model expects {tuple(places[key].shape)}", where=key
            )
    with torch.no_grad():
        for place, value in before.values():
            place.copy_(value)
        before.clear()
        for key, place in places.items():
            before[key] = place, place.detach().clone()
            place.copy_(whole[key])
