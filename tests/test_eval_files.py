"""`plait eval` of files at the prompt: rows that are only scored, and heads of more classes than the rows have."""

from __future__ import annotations

import shlex

import pytest
import typer

from plait.adapters.peft_format import write_adapter
from plait.cli import app
from plait.cli.source import Described
from tests.conftest import write_rows
from tests.panels import random_adapter
from tests.test_cli import call
from tests.test_readme import commands

STAGES = [
    c for c in commands() if c.split()[1] in ("eval", "train", "stats") and " --task " in c and "--recipe" not in c
]


@pytest.mark.parametrize("line", STAGES)
def test_commands_of_the_pages_name_the_rows_they_need(line):
    """What `parse` does not see: that a file is described by options, and not given."""
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    command = command.commands[words[0]]
    given = command.make_context(words[0], words[1:]).params
    names = ("task", "base", "root", "train_file", "validation", "text", "label", "kind")
    described = Described(**{name: given[name] for name in names if name in given})
    described = described.to_score() if words[0] == "eval" else described
    assert described.entry


def test_there_are_such_commands():
    assert {c.split()[1] for c in STAGES} == {"eval", "train", "stats"}


@pytest.fixture
def scored(tiny_base, tmp_path, monkeypatch, capsys):
    """Ask for a score of an adapter with a head of three classes."""
    monkeypatch.chdir(tmp_path)
    base = tiny_base("bert")
    adapter = random_adapter(base, "bert", "topic", "classification", 0, classes=3)
    (tmp_path / "topic").mkdir()
    write_adapter(tmp_path / "topic", adapter)

    def ask(*options: str):
        place = ("--base", base.name, "--task", "topic", "--validation-file", "rows.csv", "--text", "text")
        return call(capsys, "eval", "topic", *place, *options)

    return ask


def rows(classes: int) -> list[dict[str, object]]:
    return [{"text": f"w{i} w{i + 1}", "label": i % classes} for i in range(12)]


def test_a_validation_file_does_alone(scored, tmp_path):
    write_rows(tmp_path / "rows.csv", rows(3))
    code, said, _ = scored()
    assert code == 0 and said.rstrip().endswith("12"), said
    assert scored("--train-file", "rows.csv")[1] == said


def test_answers_of_text_tasks_are_not_guessed_from_the_rows_to_score(scored, tmp_path):
    write_rows(tmp_path / "rows.csv", rows(3))
    code, _, said = scored("--kind", "causal")
    assert code == 2 and "there is no --train-file" in said and "which answers there are" in said


def test_rows_without_the_heads_last_class_are_told_what_to_do(scored, tmp_path):
    write_rows(tmp_path / "rows.csv", rows(2))
    code, _, said = scored()
    assert code == 3 and "the head has 3 outputs, the rows name 2 classes" in said, said
    assert scored("--set", "tasks.topic.labels=['0', '1', '2']")[0] == 0
