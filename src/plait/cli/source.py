"""Where a single stage takes base, data and settings from: a recipe, or a handful of options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.errors import UsageError

if TYPE_CHECKING:
    from plait.recipe import Recipe as RecipeModel

Recipe = Annotated[Path | None, typer.Option("--recipe", help="Take base, data, tasks and settings from this recipe.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: hub name or local folder.")]
Task = Annotated[str, typer.Option("--task", help="A GLUE task, one of the recipe's, or a name for --train-file.")]
Train = Annotated[
    str | None, typer.Option("--train-file", help="csv, tsv, jsonl, parquet or hub:NAME[:CONFIG[:SPLIT]].")
]
Validation = Annotated[
    str | None, typer.Option("--validation-file", help="Like --train-file; every fifth row without it.")
]
Text = Annotated[str | None, typer.Option("--text", help="Text column, or two: premise,hypothesis.")]
Label = Annotated[str, typer.Option("--label", help="Label column.")]
Targets = Annotated[list[str] | None, typer.Option("--target-modules", help="As PEFT's; may be repeated.")]


def recipe_from(
    recipe: Path | None,
    task: str,
    base: str | None,
    root: Path | None,
    train_file: str | None,
    validation: str | None,
    text: str | None,
    label: str,
    targets: list[str] | None,
    sets: list[str] | None,
    device: str,
) -> RecipeModel:
    """A checked recipe for one stage.

    Raises:
        UsageError: Neither a recipe nor a base and a task.
    """
    from plait.recipe_file import apply_overrides, find_recipe, parse_recipe, read_recipe

    if recipe is not None:
        extra = [f"data.root={root}"] if root else []
        extra += [f"base.model={base}"] if base else []
        return read_recipe(find_recipe(recipe), [*extra, f"base.device={device}", *(sets or [])])
    if base is None:
        raise UsageError("which base model?", hint="--base NAME, or --recipe FILE")
    raw: dict[str, Any] = {
        "base": {"model": base, "device": device},
        "data": {"root": str(root) if root else None},
        "tasks": [_task(task, train_file, validation, text, label)],
        "lora": {"target_modules": targets or default_targets(base)},
        "arms": ["kaiming"],  # not used by a single stage; one that needs no other task
        "merges": ["task_arithmetic"],
        "training": {"epochs": 3},
    }
    apply_overrides(raw, sets or [])
    return parse_recipe(raw, "options")


def _task(
    task: str, train_file: str | None, validation: str | None, text: str | None, label: str
) -> str | dict[str, Any]:
    if not task:
        raise UsageError("which task?", hint="--task NAME, or --recipe FILE")
    if train_file is None:
        return task
    if not text:
        raise UsageError("which text column?", hint="--text sentence, or --text premise,hypothesis")
    return {"name": task, "train": train_file, "validation": validation, "text": text.split(","), "label": label}


def default_targets(base: str) -> list[str]:
    """PEFT's own default target modules for the base's architecture.

    Raises:
        UsageError: PEFT has none for it.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    from plait.base import BaseModel, load_config

    kind = load_config(BaseModel(base)).model_type
    if kind not in KNOWN:
        raise UsageError(
            f"PEFT has no default target modules for {kind!r}", hint="--target-modules query --target-modules value"
        )
    return sorted(KNOWN[kind])
