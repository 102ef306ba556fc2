"""How --help is written: options in groups where there are many, kinds of values in words, examples at the end."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from plait.cli.examples import EXAMPLES
from plait.cli.groups import GROUPS, OTHER, group_of
from plait.progress import note

MANY = 8  # options above which they are shown in groups
_KINDS = {
    "int": "N", "int range": "N", "float": "X", "float range": "X", "str": "TEXT", "path": "PATH", "Path": "PATH",
    "list[str]": "TEXT", "list[Path]": "PATH", "list[path]": "PATH",
}  # fmt: skip


class _Written:
    """The parts of a help page that differ from Typer's own."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Write arguments as FOLDERS... and [MORE]..., as Typer did before it had braces."""
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [re.sub(r"[{\[](\w+)[}\]]", _bare, p) if p != "[OPTIONS]" else p for p in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options, in groups where there are many."""
        arguments: list[tuple[str, str]] = []
        options: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append((re.sub(r"\s*<.*>$", "", record[0]).upper(), record[1]))
            else:
                options.setdefault(group_of(parameter.opts), []).append((_in_words(record[0]), record[1]))
        if arguments:
            _section(formatter, "Arguments", arguments)
        if sum(map(len, options.values())) <= MANY:
            options = {OTHER: [row for rows in options.values() for row in rows]}
        elif other := options.pop(OTHER, []):  # --help
            options.setdefault(GROUPS[-1], []).extend(other)
        for group in (*GROUPS, OTHER):
            if rows := options.get(group):
                _section(formatter, group, rows)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, line by line as they are typed."""
        epilog = getattr(self, "epilog", None)
        if epilog:
            formatter.write("\nExamples:\n" + "".join(f"  {line}".rstrip() + "\n" for line in epilog.splitlines()))


class Command(_Written, TyperCommand):
    """A command whose help has groups and examples, and that says which of its options stand there twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever; where an option that takes one value has several, the last of them counts, and that is said."""
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        rest = super().parse_args(ctx, args)
        for parameter, times in Counter(p for p in order if _takes_one(p)).items():
            if times > 1:
                note(f"{parameter.opts[0]} is given {times} times: the last one counts")
        return rest


class Group(_Written, TyperGroup):
    """A group of commands whose help has them too."""


def dressed(app: typer.Typer, path: tuple[str, ...] = ()) -> typer.Typer:
    """Give every command of an application, and of those within it, this help and its examples."""
    for info in app.registered_commands:
        name = info.name or getattr(info.callback, "__name__", "").replace("_", "-")
        info.cls, info.epilog = Command, EXAMPLES.get(" ".join((*path, name)))
    for group in app.registered_groups:
        if group.typer_instance is not None and group.name:
            group.cls, group.epilog = Group, EXAMPLES.get(group.name)
            dressed(group.typer_instance, (*path, group.name))
    return app


def _takes_one(parameter: Any) -> bool:
    """Whether an option has one value, or is one of two opposite flags: then giving it again drops what was given before."""
    one = parameter.param_type_name == "option" and not parameter.multiple and not getattr(parameter, "count", False)
    return one and (not getattr(parameter, "is_flag", False) or bool(parameter.secondary_opts))


def _section(formatter: Any, title: str, rows: list[tuple[str, str]]) -> None:
    with formatter.section(title):
        formatter.write_dl(rows)


def _in_words(name: str) -> str:
    """``--rank <int range>`` as ``--rank N``."""
    return re.sub(r"<(.+)>$", lambda m: _KINDS.get(m[1], f"<{m[1]}>"), name)


def _bare(match: re.Match[str]) -> str:
    name = match[1].upper()
    return f"[{name}]" if match[0].startswith("[") else name
