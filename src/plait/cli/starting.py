"""Commands to begin with: new, schema."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from plait.border.counts import plural
from plait.cli.options import Json, Overwrite
from plait.cli.output import emit
from plait.errors import UsageError

Tasks = Annotated[
    list[str],
    typer.Option("--task", metavar="NAME=FILE:TEXT[,TEXT][:LABEL]", help="A file and its columns, or a GLUE task; repeat."),
]  # fmt: skip
Validations = Annotated[
    list[str] | None,
    typer.Option("--validation", metavar="NAME=FILE", help="Held-out rows of a task; every fifth row without; repeat."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(new)
    app.command()(schema)


def new(
    recipe: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    base: Annotated[str, typer.Option("--base", help="Base model: hub name or local folder.")],
    task: Tasks,
    validation: Validations = None,
    kind: Annotated[str | None, typer.Option("--kind", help="classification, regression, causal or seq2seq; found out by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe of that name.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a commented recipe for your own base and files."""
    from plait.runs.fresh import new_recipe, parse_task
    from plait.tasks.task import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind!r}", hint=f"one of {', '.join(KINDS)}")
    tasks = [parse_task(t) for t in task]
    held = dict(pair.partition("=")[::2] for pair in validation or [])
    if wrong := [name for name, file in held.items() if name not in {t.name for t in tasks if t.train} or not file]:
        raise UsageError(f"--validation {wrong[0]!r} is no task with a file", hint="--validation NAME=FILE")
    tasks = [replace(t, validation=held.get(t.name)) for t in tasks]
    written = new_recipe(recipe, base, tasks, kind=kind, overwrite=overwrite)
    described = ", ".join(f"{t} ({k}, {_rows(written.rows.get(t))})" for t, k in written.tasks.items())
    place = shlex.quote(str(recipe))
    lines = [f"{recipe}: {described}; adapts {', '.join(written.target_modules)}, {written.max_length} tokens a row"]
    lines += [f"next: plait plan {place}", f"      plait run {place} --out {shlex.quote(recipe.stem + '-run')}"]
    emit(written, as_json, "\n".join(lines))


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write it here instead of printing it.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of recipes. For editors that complete and check as you type.

    A recipe's first line may then be: # yaml-language-server: $schema=recipe.schema.json
    """
    from plait.disk.store import staged_file
    from plait.recipes.schema import is_schema, recipe_schema

    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False)
    if out is not None:
        with staged_file(out, overwrite=overwrite, ours=is_schema) as stage:
            stage.write_text(text + "\n", encoding="utf-8")
        emit({"output": str(out.absolute())}, as_json, str(out))
        return
    emit({"recipe": recipe_schema()}, as_json, text)


def _rows(count: int | None) -> str:
    return "? rows" if count is None else plural(count, "row")
