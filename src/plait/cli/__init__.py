"""The command line: one command per stage, no logic."""

from __future__ import annotations

import sys

import typer

from plait import __version__
from plait.cli import merging, recipes, stages, statistics
from plait.cli.output import guarded, unexpected

app = typer.Typer(
    name="plait",
    help="LoRA adapters that merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (recipes, statistics, stages, merging):
    module.register(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """LoRA adapters that merge.

    New here? `plait demo` trains, merges and scores real adapters in a few minutes.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command and exit with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    command = typer.main.get_command(app)
    given = [a for a in given if a != "--debug"]  # allowed anywhere

    def call() -> int | None:
        try:
            return command.main(given, prog_name="plait", standalone_mode=False)  # type: ignore[no-any-return]
        except Exception as e:
            code = _usage(e)
            if code is None:
                raise
            return code

    try:
        sys.exit(guarded(call, debug=debug, as_json="--json" in given))
    except Exception as e:
        if debug:
            raise
        sys.exit(unexpected(e))


def _usage(error: Exception) -> int | None:
    """Exit code 2 and one line for what the argument parser refuses; None for anything else."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())  # type: ignore[attr-defined]
        return 2
    if type(error).__name__ in ("Abort", "Exit"):
        return getattr(error, "exit_code", 130)
    if not hasattr(error, "format_message"):
        return None
    message = " ".join(str(error.format_message()).split())
    typer.echo(f"error: {message} (plait --help lists the commands)", err=True)
    return 2
