"""The command line: one command per stage, no logic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from plait.cli import (
    checking,
    comparing,
    environment,
    existing,
    export,
    formats,
    measuring,
    merging,
    push,
    recipes,
    stages,
    starting,
    statistics,
    study,
    trying,
)
from plait.cli.environment import VARIABLE, complete
from plait.cli.help import Group, dressed
from plait.cli.output import guarded
from plait.disk.hub import go_offline
from plait.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="plait",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (
    starting,
    recipes,
    statistics,
    stages,
    merging,
    existing,
    comparing,
    formats,
    export,
    checking,
    push,
    trying,
    measuring,
    study,
    environment,
):
    module.register(app)
dressed(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    offline: bool = typer.Option(
        False, "--offline", help="Ask nothing of the network; with any command, anywhere in it."
    ),
) -> None:
    """LoRA adapters that merge.

    New here? `plait demo` trains, merges and scores real adapters in a few minutes. Adapters at hand? `plait advise` and
    `plait merge` need nothing but their folders.
    """


def main(
    arguments: list[str] | None = None,
    *,
    begin: Callable[[], Callable[[], int]] | None = None,
    end: Callable[[], None] | None = None,
) -> None:
    """Run a command and exit with its code.

    Args:
        arguments: By default those of the process.
        begin: Called once errors are told in one line; gives what tells the exit code of an interrupt that has come since.
        end: Called when nothing is left to be cleared away.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    if "--offline" in given:
        go_offline()
    given = [a for a in given if a not in ("--debug", "--offline")]  # allowed anywhere
    command = typer.main.get_command(app)
    if asked := os.environ.get(VARIABLE):
        sys.exit(complete(command, asked))

    def call() -> int | None:
        try:
            with command.make_context("plait", list(given)) as context:
                command.invoke(context)
        except Exception as e:
            if type(e).__name__ == "Exit":
                return int(getattr(e, "exit_code", 0))
            if type(e).__name__ == "NoArgsIsHelpError":
                typer.echo(e.format_message())  # type: ignore[attr-defined]
                return 2
            raise
        return 0

    code = guarded(call, debug=debug, as_json="--json" in given, begin=begin)
    if end is not None:
        end()
    sys.exit(code)
