"""The command that asks a base, each adapter and their merge the same prompts."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Device, Json, Overwrite
from plait.cli.output import emit
from plait.errors import UsageError
from plait.progress import note

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        metavar="[TASK=]FILE",
        help="A prompt a line, or a table's FILE:COLUMN[,COLUMN]; TASK=FILE, or a column task in the table, asks each task its own.",
    ),
]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="One prompt; may be repeated.")]
Base = Annotated[str | None, typer.Option("--base", help="The base; by default the one that the merge names.")]
Moved = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="Where an adapter of the merge is now; may be repeated."),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="The tokenizer's chat template around each prompt; by default as adapters were trained, else where there is one.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command("try")(try_)


def try_(
    merged: Annotated[str, typer.Argument(help="The merge, or one adapter: its folder, or its name on the hub.")],
    prompts: Files = None, prompt: Prompt = None, base: Base = None, adapter: Moved = None, chat: Chat = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens at most.")] = 64,
    length: Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a prompt at most.")] = 512,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="Write a page too.")] = None,
    device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what base, adapters and merge answer, side by side.

    Text models write, greedily; classifiers give a class and its probability. The adapters are those of the merge's own record,
    where they still are. Prompts go in as they were in training: with the template that was put around them then.
    """
    from plait.disk.overwriting import require_place
    from plait.trying.answers import tried
    from plait.trying.inputs import trial_of
    from plait.trying.page import is_page, text_of, write_page
    from plait.trying.prompts import read_files, read_prompts, tasks_of
    from plait.trying.records import TrySettings

    if out is not None:
        require_place(out, is_page, overwrite=overwrite)
    if not (prompts or prompt):
        raise UsageError("nothing to ask", hint="--prompts FILE, or --prompt TEXT")
    files = read_files(prompts or [])
    trial = trial_of(merged, base, adapter or [], device)
    asked = read_prompts(files, prompt or [], tasks_of(trial))
    answers = tried(trial, asked, TrySettings(tokens, chat, length), on_progress=note)
    page = write_page(answers, out, overwrite=overwrite) if out is not None else None
    text = text_of(answers, shutil.get_terminal_size((100, 24)).columns)
    result = {**asdict(answers), "output": str(page.absolute())} if page else asdict(answers)
    emit(result, as_json, f"{text}\n\nsame as a page: {page}" if page else text)
