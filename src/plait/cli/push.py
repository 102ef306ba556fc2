"""The command that sends a folder to the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.border.counts import plural
from plait.cli.options import Json
from plait.cli.output import emit, table

if TYPE_CHECKING:
    from plait.publishing.push import Pushed


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(push)


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter or model folder, of plait's or PEFT's.")],
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="The repository on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that only you see.")] = False,
    base: Annotated[str | None, typer.Option("--base", metavar="USER/NAME", help="The base, where the folder names a path.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; ask nothing of the network.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the repository holds.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Send a folder to the Hugging Face hub, with its model card.

    `plait check` has to pass first. The copy on the hub names no path of this machine; everything goes in one commit. The token
    is the one of `hf auth login`, or HF_TOKEN.
    """
    from plait.publishing.push import PushSettings
    from plait.publishing.push import push as send

    if not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    emit(
        pushed := send(folder, to, PushSettings(private, base, overwrite, dry_run)), as_json, push_text(pushed, dry_run)
    )


def push_text(pushed: Pushed, dry_run: bool) -> str:
    """List what was sent or would be, and say where it is and how to load it."""
    rows = [[f.path, f"{f.bytes:,}"] for f in pushed.files]
    lines = [table(["file", "bytes"], rows)]
    lines += [f"not sent: {name}" for name in pushed.left_out]
    lines += [f"taken out of the repository: {name}" for name in pushed.removed]
    total = sum(f.bytes for f in pushed.files)
    where = f"{pushed.repo}{' (private)' if pushed.private else ''}"
    if dry_run:
        lines += ["", f"{plural(len(rows), 'file')}, {plural(total, 'byte')}, would go to {where}; nothing was sent"]
    elif not pushed.sent:
        lines += ["", f"{where} holds all of it already: {pushed.url}"]
    else:
        lines += [
            "",
            f"{plural(len(rows), 'file')}, {plural(total, 'byte')} -> {pushed.url}{' (private)' if pushed.private else ''}",
        ]
    lines.append(f"base: {pushed.base}" if pushed.base else "a whole model")
    return "\n".join(lines)
