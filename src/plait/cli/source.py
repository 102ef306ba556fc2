"""Where a single stage takes base, data and settings from: a recipe, or a handful of options."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.errors import UsageError

if TYPE_CHECKING:
    from plait.recipes.recipe import Settings

Recipe = Annotated[Path | None, typer.Option("--recipe", help="Take base, data, tasks and settings from this recipe.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: hub name or local folder.")]
Task = Annotated[str, typer.Option("--task", help="A GLUE task, one of the recipe's, or a name for --train-file.")]
Train = Annotated[
    str | None, typer.Option("--train-file", help="csv, tsv, jsonl, parquet or hub:NAME[@REVISION][:CONFIG[:SPLIT]].")
]
Validation = Annotated[
    str | None, typer.Option("--validation-file", help="Like --train-file; every fifth row without it.")
]
Text = Annotated[str | None, typer.Option("--text", help="Text column, or two: premise,hypothesis.")]
Label = Annotated[str | None, typer.Option("--label", help="Label column; label by default.")]
Kind = Annotated[str | None, typer.Option("--kind", help="classification (default), regression, causal or seq2seq.")]
Targets = Annotated[list[str] | None, typer.Option("--target-modules", help="As PEFT's; a suffix may be repeated.")]


@dataclass(frozen=True, slots=True)
class Described:
    """A base and a task as options describe them, where no recipe does.

    Args:
        task: A GLUE task, or a name for the file's.
        base: Base model: hub name or local folder.
        root: Folder of local data.
        train_file: Its rows, or None for a GLUE task.
        validation: Its held-out rows.
        text: Text column, or two.
        label: Label column.
        kind: Kind of the task.
    """

    task: str = ""
    base: str | None = None
    root: Path | None = None
    train_file: str | None = None
    validation: str | None = None
    text: str | None = None
    label: str | None = None
    kind: str | None = None

    def to_score(self) -> Described:
        """The same where rows are only scored: of tasks with heads a validation file does alone, since the head knows its classes.

        Answers of text tasks are chosen among, or written, by what the training rows say: these have to be named.
        """
        alone = self.train_file is None and (self.kind or "classification") in ("classification", "regression")
        return replace(self, train_file=self.validation) if alone else self

    @property
    def of_a_file(self) -> dict[str, str | None]:
        """The options that describe a file, by name."""
        return {
            "--train-file": self.train_file,
            "--validation-file": self.validation,
            "--text": self.text,
            "--label": self.label,
            "--kind": self.kind,
        }

    @property
    def entry(self) -> str | dict[str, Any]:
        """The task as a recipe has it.

        Raises:
            UsageError: No task, or a file that is described and not given, or without a text column.
        """
        if not self.task:
            raise UsageError("which task?", hint="--task NAME, or --recipe FILE")
        if self.train_file is None:
            for option, value in self.of_a_file.items():
                if value is not None:
                    answers = (
                        f"; of {self.kind} tasks it says which answers there are"
                        if self.kind in ("causal", "seq2seq")
                        else ""
                    )
                    raise UsageError(
                        f"{option} describes a file, and there is no --train-file", hint=f"--train-file FILE{answers}"
                    )
            return self.task
        if not self.text:
            raise UsageError("which text column?", hint="--text sentence, or --text premise,hypothesis")
        options = {"label": self.label, "kind": self.kind, "validation": self.validation}
        entry = {"name": self.task, "train": self.train_file, "text": self.text.split(",")}
        return {**entry, **{k: v for k, v in options.items() if v is not None}}


def in_four_bits(kind: str | None) -> list[str]:
    """The setting that `--base-4bit` stands for; none without it."""
    return [f"base.four_bits={kind}"] if kind else []


def settings_from(
    recipe: Path | None,
    described: Described,
    sets: list[str] | None,
    device: str,
    *,
    targets: list[str] | None = None,
    adapts: bool = False,
) -> Settings:
    """Checked settings for one stage.

    Args:
        recipe: A recipe that holds them.
        described: What describes them without one.
        sets: Overrides of either.
        device: Where the base goes.
        targets: Modules, as PEFT's.
        adapts: Whether the stage asks which modules; then PEFT's own for the base are taken where `targets` names none.

    Raises:
        UsageError: Neither a recipe nor a base and a task, or a recipe beside what describes a task.
    """
    from plait.recipes.recipe_file import apply_overrides, find_recipe, parse_settings, read_recipe
    from plait.runs.targets import default_targets

    base, root = described.base, described.root
    if recipe is not None:
        for option, value in {**described.of_a_file, "--target-modules": targets}.items():
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
        "tasks": [described.entry],
        "training": {"epochs": 3},
    }
    if adapts:
        raw["lora"] = {"target_modules": _targets(targets) if targets else default_targets(base)}
    apply_overrides(raw, sets or [])
    return parse_settings(raw, "options")


def _targets(given: list[str]) -> list[str] | str:
    """Suffixes, or one regex over whole names, or "all-linear"; a suffix has letters, digits, "_" and "." only."""
    return given if len(given) > 1 or re.fullmatch(r"[\w.]+", given[0]) else given[0]
