"""What PEFT and the HF Trainer call the keys of a recipe: the same thing is understood, a near one is suggested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.errors import UsageError, printable

# Section -> their name -> the recipe's, where both mean the same.
SAME: dict[str, dict[str, str]] = {
    "lora": {"r": "rank", "lora_alpha": "alpha"},
    "training": {
        "learning_rate": "lr",
        "num_train_epochs": "epochs",
        "max_steps": "steps",
        "lr_scheduler_type": "schedule",
    },
    "base": {
        "name": "model",
        "model_name_or_path": "model",
        "base_model_name_or_path": "model",
        "torch_dtype": "dtype",
    },
    "data": {"max_seq_length": "max_length"},
}
# Their name -> what to write instead, where the meaning differs a little or the place does.
NEAR = {
    "lora_dropout": "training.dropout",
    "per_device_train_batch_size": "training.batch_size, the rows of a whole step",
    "train_batch_size": "training.batch_size, the rows of a whole step",
    "gradient_accumulation_steps": "training.accumulation, which divides batch_size",
    "warmup_steps": "training.warmup_ratio, a share of the steps",
    "bf16": "training.precision: bf16",
    "fp16": "training.precision: bf16, or leave it out",
    "save_steps": "training.checkpoint_every",
    "eval_steps": "training.evaluate_every",
    "early_stopping_patience": "training.patience",
    "seed": "seeds, a list",
    "model": "base.model",
    "base_model": "base.model",
    "methods": "merges",
    "merge_method": "merges",
    "datasets": "tasks",
    "dataset": "tasks",
    "text_column": "text",
    "label_column": "label",
    "train_file": "train",
    "validation_file": "validation",
    "test": "validation",
}


def understood(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Put the recipe's own names where a raw recipe has PEFT's or the Trainer's; arms' trainings too.

    Raises:
        UsageError: A key stands there under both names.
    """
    found = {k: _renamed(v, k, where) for k, v in raw.items()}
    if isinstance(arms := found.get("arms"), list):
        found["arms"] = [
            {**a, "training": _renamed(a["training"], "training", where)}
            if isinstance(a, dict) and "training" in a
            else a
            for a in arms
        ]
    return found


def own_key(dotted: str) -> str:
    """A dotted key by the recipe's own names.

    >>> own_key("lora.r"), own_key("training.learning_rate"), own_key("tasks.a.text")
    ('lora.rank', 'training.lr', 'tasks.a.text')
    """
    *parents, last = dotted.split(".")
    is_section = len(parents) == 1 or (parents[:1] == ["arms"] and parents[2:] == ["training"])  # else an entry's name
    return ".".join([*parents, SAME.get(parents[-1], {}).get(last, last)]) if is_section else dotted


def suggestion(key: str) -> str | None:
    """What to write instead of a key of other tools; None where nothing is known."""
    return NEAR.get(key)


def _renamed(values: Any, section: str, where: str) -> Any:
    names = SAME.get(section)
    if not names or not isinstance(values, dict):
        return values
    for theirs, ours in names.items():
        if theirs in values and ours in values:
            text = f"{section}.{theirs} and {section}.{ours} are one thing"
            raise UsageError(text, where=printable(where), hint="give one of them")
    return {names.get(k, k) if isinstance(k, str) else k: v for k, v in values.items()}
