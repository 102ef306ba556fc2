"""Where a single stage takes base, data and settings from: a recipe, or a handful of options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.errors import UsageError

if TYPE_CHECKING:
    from plait.runs.recipe import Recipe as RecipeModel

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
Label = Annotated[str | None, typer.Option("--label", help="Label column; label by default.")]
Kind = Annotated[str | None, typer.Option("--kind", help="classification (default), regression, causal or seq2seq.")]
Targets = Annotated[list[str] | None, typer.Option("--target-modules", help="As PEFT's; a suffix may be repeated.")]


def recipe_from(
    recipe: Path | None,
    task: str,
    base: str | None,
    root: Path | None,
    train_file: str | None,
    validation: str | None,
    text: str | None,
    label: str | None,
    targets: list[str] | None,
    sets: list[str] | None,
    device: str,
    kind: str | None = None,
) -> RecipeModel:
    """A checked recipe for one stage.

    Raises:
        UsageError: Neither a recipe nor a base and a task, or a recipe beside what describes a task.
    """
    from plait.runs.recipe_file import apply_overrides, find_recipe, parse_recipe, read_recipe

    described = {
        "--train-file": train_file,
        "--validation-file": validation,
        "--text": text,
        "--label": label,
        "--kind": kind,
    }
    if recipe is not None:
        for option, value in {**described, "--target-modules": targets}.items():
            if value is not None:
                raise UsageError(f"--recipe and {option} exclude each other", hint="the recipe says it, or --set does")
        extra = [f"data.root={root}"] if root else []
        extra += [f"base.model={base}"] if base else []
        return read_recipe(find_recipe(recipe), [*extra, f"base.device={device}", *(sets or [])])
    if base is None:
        raise UsageError("which base model?", hint="--base NAME, or --recipe FILE")
    raw: dict[str, Any] = {
        "base": {"model": base, "device": device},
        "data": {"root": str(root) if root else None},
        "tasks": [_task(task, described)],
        "lora": {"target_modules": _targets(targets) if targets else default_targets(base)},
        "arms": ["kaiming"],  # not used by a single stage; one that needs no other task
        "merges": ["task_arithmetic"],
        "training": {"epochs": 3},
    }
    apply_overrides(raw, sets or [])
    return parse_recipe(raw, "options")


def _task(task: str, described: dict[str, str | None]) -> str | dict[str, Any]:
    if not task:
        raise UsageError("which task?", hint="--task NAME, or --recipe FILE")
    train, validation, text, label, kind = described.values()
    if train is None:
        for option, value in described.items():
            if value is not None:
                raise UsageError(f"{option} describes a file, and there is no --train-file", hint="--train-file FILE")
        return task
    if not text:
        raise UsageError("which text column?", hint="--text sentence, or --text premise,hypothesis")
    given = {"label": label, "kind": kind, "validation": validation}
    return {"name": task, "train": train, "text": text.split(","), **{k: v for k, v in given.items() if v is not None}}


def _targets(given: list[str]) -> list[str] | str:
    """Suffixes, or one regex over whole names, or "all-linear"; a suffix has letters, digits, "_" and "." only."""
    return given if len(given) > 1 or re.fullmatch(r"[\w.]+", given[0]) else given[0]


def default_targets(base: str) -> list[str]:
    """PEFT's own default target modules for the base's architecture.

    Raises:
        UsageError: PEFT has none for it.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    from plait.disk.hub import split_revision
    from plait.model.base import BaseModel, load_config

    kind = load_config(BaseModel(*split_revision(base))).model_type
    if kind not in KNOWN:
        raise UsageError(
            f"PEFT has no default target modules for {kind!r}", hint="--target-modules query --target-modules value"
        )
    return sorted(KNOWN[kind])
