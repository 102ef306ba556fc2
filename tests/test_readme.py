"""Every command in the README and the guide is one the program understands; the Python runs against the public names."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import plait
from plait.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.is_file()]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language
    ]


def commands() -> list[str]:
    lines = [line for _, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("plait ")]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    command = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    context = command.make_context("plait", list(words))
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not context.args


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_names_exist(page, text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "plait":
            for alias in node.names:
                assert hasattr(plait, alias.name), f"{page}: plait.{alias.name}"
