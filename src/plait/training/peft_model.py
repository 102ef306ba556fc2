"""An adapter on a task's model as PEFT trains it, and the adapter taken back out of it."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plait.adapters.heads import facts_of_task
from plait.adapters.lineage import same_name
from plait.adapters.lora import EMBEDDING, EXPERT, Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.errors import InputError, UsageError
from plait.model.applied import in_backbone
from plait.model.base import BaseModel, backbone_of, head_state, load_head
from plait.model.layers import linear_shape
from plait.tasks.task import Task, require_same_classes

TASK_TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def for_task(initial: Adapter, task: Task, model: nn.Module) -> Adapter:
    """Prepare an adapter for training on a task: named after it, on the task's model, with the model's head.

    A head that the adapter already has for this task is put into the model first: training continues from it. Modules
    of a text adapter are named on disk as in the whole model; here all names are relative to the backbone.
    """
    if task.name in initial.heads:
        initial.require_of_texts(task.name)
        require_same_classes(task, initial.classes_of(task.name), initial.name)
        load_head(model, initial.heads[task.name])
    head = head_state(model) if TASK_TYPES[task.kind] == "SEQ_CLS" else {}
    return replace(
        in_backbone(model, initial),
        name=task.name,
        task_type=TASK_TYPES[task.kind],
        prefix=backbone_of(model)[1],
        heads={task.name: head} if head else {},
        head_facts={task.name: facts_of_task(task.kind, task.labels)} if head else {},
    )


def named_for(adapter: Adapter, base: BaseModel) -> Adapter:
    """Have an adapter name the base that it is trained on, where it names another: by that name others load and merge it.

    Where both can be one (the last parts of the names agree, as of a hub name and a folder), it keeps the name that it has.
    """
    if adapter.base and same_name(adapter.base, base.name):
        return adapter
    return replace(adapter, base=base.name, revision=base.revision)


def attach(model: Any, adapter: Adapter, *, dropout: float = 0.0) -> Any:
    """Put an adapter on a task's model, ready to train.

    The adapter goes through the folder that any other trainer would be given, so what is trained here is what they
    would train.

    Args:
        model: The task's model.
        adapter: From `for_task`.
        dropout: On the input of A.

    Returns:
        The PeftModel, factors in float32 whatever the base's dtype, factors and head trainable.

    Raises:
        InputError: PEFT found other modules than the adapter holds: it is of another base.
    """
    from peft import LoraConfig, PeftModel

    if dropout and adapter.target_parameters:
        raise UsageError(
            f"dropout {dropout} and a router ({adapter.target_parameters[0]}): PEFT drops no inputs of parameters",
            hint="dropout 0, or target_modules without routers",
        )
    known = dict(model.named_modules())
    for name, factors in adapter.modules.items():
        _check_module(known.get(adapter.full_name(name)), factors, name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        write_adapter(Path(folder), replace(adapter, target_modules=None))
        config = LoraConfig.from_pretrained(folder)
        config.lora_dropout = dropout
        config.inference_mode = False
        config.base_model_name_or_path = ""  # else PEFT asks the hub for the base's config whenever it saves
        # peft 0.21 asks transformers for a property that transformers 5 has renamed; the answer is still right.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a half-precision base must not train its head in half precision
    return peft_model


def _check_module(module: nn.Module | None, factors: LoraFactors, name: str) -> None:
    if factors.kind == EXPERT:
        raise InputError(
            "fused experts are merged and scored here, but not trained",
            where=name,
            hint="PeftModel.from_pretrained(model, FOLDER, is_trainable=True) trains them on",
        )
    if module is None:
        raise InputError("no such module in the base model", where=name, hint="is this adapter of another base?")
    # a quantised weight is packed: only the layer itself says how wide it is
    shape = linear_shape(module) or tuple(getattr(getattr(module, "weight", None), "shape", ()))
    expected = factors.shape[::-1] if factors.kind == EMBEDDING else factors.shape
    if shape not in (expected, expected[::-1]):
        raise InputError(f"the adapter's update is {expected}, the base's module {shape}", where=name)


def detach(peft_model: Any, adapter: Adapter, source: Mapping[str, Any]) -> Adapter:
    """Take the adapter out of a model, with the factors and the head that it holds now, as copies on the CPU.

    Args:
        peft_model: From `attach`, bare or wrapped.
        adapter: The one it was made from.
        source: Recorded in the result.
    """
    from peft import get_peft_model_state_dict

    state = {
        k: v.detach().cpu().clone()
        for k, v in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()
    }
    root = "base_model.model."
    modules = {name: _factors(state, root + adapter.full_name(name), f) for name, f in adapter.modules.items()}
    head: dict[str, Tensor] = {k.removeprefix(root): v for k, v in state.items()}
    return replace(adapter, modules=modules, heads={adapter.name: head} if head else {}, source=dict(source))


def write_detached(folder: Path, peft_model: Any, adapter: Adapter) -> None:
    """Write the adapter that a model holds now into a folder, in place of the one before: never half of one."""
    stage = folder.with_name(f".{folder.name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    write_adapter(stage, detach(peft_model, adapter, {}))
    shutil.rmtree(folder, ignore_errors=True)
    stage.rename(folder)


def _factors(state: dict[str, Tensor], name: str, like: LoraFactors) -> LoraFactors:
    dot = "_" if like.kind == EMBEDDING else "."
    keys = [f"{name}.lora_{half}.weight" if dot == "." else f"{name}.lora_embedding_{half}" for half in "AB"]
    return LoraFactors(state.pop(keys[0]), state.pop(keys[1]), like.scaling, like.kind)


def silence_dropout(model: nn.Module) -> None:
    """Switch the base's own dropout off: layers, and the probabilities that attention functions read themselves."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
