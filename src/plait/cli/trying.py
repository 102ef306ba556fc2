"""The command that asks a base, each adapter and their merge the same prompts."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Device, Json, Overwrite
from plait.cli.output import emit
from plait.errors import UsageError, printable
from plait.progress import note

if TYPE_CHECKING:
    from plait.fidelity.texts import Texts

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts", metavar="FILE", help="A prompt a line, or a table's FILE:COLUMN[,COLUMN]; TASK=FILE for one head."
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
        help="The tokenizer's chat template around each prompt; by default where adapters were trained so.",
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
    from plait.trying.answers import TrySettings, tried
    from plait.trying.inputs import trial_of
    from plait.trying.page import is_page, text_of, write_page

    if out is not None:
        require_place(out, is_page, overwrite=overwrite)

    for_all, of_tasks = _prompts(prompts or [], prompt or [])
    trial = trial_of(merged, base, adapter or [], device)
    answers = tried(trial, for_all, of_tasks, TrySettings(tokens, chat, length), on_progress=note)
    page = write_page(answers, out, overwrite=overwrite) if out is not None else None
    text = text_of(answers, shutil.get_terminal_size((100, 24)).columns)
    result = {**asdict(answers), "output": str(page.absolute())} if page else asdict(answers)
    emit(result, as_json, f"{text}\n\nsame as a page: {page}" if page else text)


def _prompts(files: list[str], texts: list[str]) -> tuple[Texts, dict[str, Texts]]:
    """Prompts for everybody, and those of one head."""
    from plait.fidelity.texts import checked, read_place

    for_all: list[tuple[str, ...]] = [(text,) for text in texts]
    of_tasks: dict[str, Texts] = {}
    for place in files:
        task, equals, file = place.partition("=")
        if equals and not Path(place).exists():
            if task in of_tasks:
                raise UsageError(f"--prompts names {printable(task)!r} twice")
            of_tasks[task] = read_place(file)
        else:
            for_all += read_place(place)
    if not for_all and not of_tasks:
        raise UsageError("nothing to ask", hint="--prompts FILE, or --prompt TEXT")
    return checked(tuple(for_all), "the prompts") if for_all else (), of_tasks
