"""The command that writes an adapter for one loader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.border.counts import plural
from plait.cli.options import Json, Out, Overwrite
from plait.cli.output import emit

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.formats.export import ExportRecord


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(export)


def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, trained or merged.")],
    out: Out,
    loader: Annotated[str, typer.Option("--for", help="peft, vllm or gguf (llama.cpp).")],
    task: Annotated[str | None, typer.Option("--task", help="Which of its heads goes with it.")] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Folder of the base: gguf needs its config.json.")] = None,
    overwrite: Overwrite = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write an adapter as its loader takes it, and print the lines."""
    from plait.formats.export import export as write

    written = write(adapter, out, loader=loader, task=task, base=base, overwrite=overwrite)
    emit(written, as_json, export_text(written))


def export_text(written: Written[ExportRecord]) -> str:
    """Say what was written, what rounding took, and which lines load it."""
    record = written.record
    head = f" with the head of {record.task}" if record.task else ""
    lines = [f"{plural(record.modules, 'module')}, rank {record.rank}{head}, for {record.loader} -> {written.output}"]
    if written.reused:
        lines[0] += " (was there already)"
    if record.rounding_error:
        lines.append(f"scalings multiplied into B: the rounding is {record.rounding_error:.1e} of it at most")
    return "\n".join([*lines, "", record.next.rstrip()])
