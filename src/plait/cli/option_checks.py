"""Options that make no sense together are refused, never ignored: which of them were typed, and which may be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from plait.errors import UsageError


def typed(context: typer.Context) -> dict[str, str]:
    """Parameter -> option, of those that stand on the command line."""
    named = {p.name: _written(p, context.params.get(p.name)) for p in context.command.params if p.name}
    sources = {name: context.get_parameter_source(name) for name in named}
    return {n: option for n, option in named.items() if option and getattr(sources[n], "name", "") == "COMMANDLINE"}


def _written(parameter: Any, value: object) -> str:
    """An option as it was typed: of a pair such as --fit and --no-fit the second where it is off; "" for an argument."""
    second = value is False and any(o.startswith("--") for o in parameter.secondary_opts)
    return next((o for o in (parameter.secondary_opts if second else parameter.opts) if o.startswith("--")), "")


def only(context: typer.Context, what: str, allowed: Iterable[str], *, hint: str = "") -> None:
    """Refuse every option that was typed and is not among `allowed` parameters.

    Raises:
        UsageError: Names the options.
    """
    _refuse([option for name, option in typed(context).items() if name not in {*allowed, "as_json"}], what, hint)


def without(context: typer.Context, what: str, refused: Iterable[str], *, hint: str = "") -> None:
    """Refuse the options of these parameters where they were typed.

    Raises:
        UsageError: Names the options.
    """
    options = typed(context)
    _refuse([options[name] for name in refused if name in options], what, hint)


def _refuse(options: list[str], what: str, hint: str) -> None:
    if options:
        raise UsageError(f"{what} takes no {' and no '.join(options)}", hint=hint or "leave it out")
