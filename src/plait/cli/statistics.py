"""Statistics: collecting them, and the file as a thing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Device, Json, Overwrite, Root, Seed, Set
from plait.cli.output import emit
from plait.cli.source import Base, Label, Recipe, Targets, Task, Text, Train, Validation, recipe_from
from plait.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    group = typer.Typer(
        rich_markup_mode=None, help="Statistics of a task's layer inputs: collect, show, merge, compare."
    )
    group.callback(invoke_without_command=True)(collect)
    app.add_typer(group, name="stats")


def collect(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="The file, TASK.stats.safetensors.")] = None,
    recipe: Recipe = None, base: Base = None, task: Task = "", root: Root = None, train_file: Train = None,
    validation: Validation = None, text: Text = None, label: Label = "label", targets: Targets = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Training rows to look at; 100 by default.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="token (default) or mean.")] = None,
    sets: Set = None, device: Device = "auto", seed: Seed = 0, overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Collect a task's statistics: what it feeds into every target module. The file can be shared instead of the data."""
    if context.invoked_subcommand is not None:
        return
    from plait.commands import collect_one

    if out is None:
        raise UsageError("where to?", hint="--out TASK.stats.safetensors")
    extra = [f"statistics.samples={samples}"] if samples else []
    extra += [f"statistics.pool={pool}"] if pool else []
    chosen = recipe_from(
        recipe, task, base, root, train_file, validation, text, label, targets, [*extra, *(sets or [])], device
    )
    found = collect_one(chosen, task, out, seed=seed, overwrite=overwrite)
    line = f"{task}: {found['samples']} rows, {found['tokens']} tokens, {found['sites']} sites -> {out}"
    emit(found, as_json, line + (" (was there already)" if found["reused"] else ""))
