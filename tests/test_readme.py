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
# In sentences: a command between backticks, over two lines at most.
MENTION = re.compile(r"(?<!`)`(plait [^`\n]+(?:\n[^`\n]+)?)`(?!`)")
# What it may leave open, by the parser's exceptions: an operand, a number behind a placeholder, an option's value, a group's command.
UNSAID = ("MissingParameter", "BadParameter", "BadOptionUsage", "NoArgsIsHelpError")
SAID_BESIDE = ("plait stats fisher adapters/support",)  # "with the same options"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language
    ]


def commands() -> list[str]:
    texts = [text for kind in ("bash", "console") for _, text in blocks(kind)]
    lines = [line.removeprefix("$ ") for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("plait ")]


def mentions() -> list[tuple[str, str]]:
    """Page -> what stands between backticks in its sentences and begins with plait."""
    spans = [(p.name, m) for p in PAGES[1:] for m in MENTION.findall(BLOCK.sub("", p.read_text("utf-8")))]
    return sorted({(page, " ".join(m.split())) for page, m in spans if "..." not in m})


def parse(line: str) -> None:
    """Have the program understand a line, but run nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("plait", shlex.split(line, comments=True)[1:])
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not context.args


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    parse(line)


@pytest.mark.parametrize(("page", "line"), mentions())
def test_what_sentences_mention_is_there(page, line):
    """Its command and its options; where it names what the command is given, it is whole. FILE and N may stand for anything."""
    try:
        parse(line)
    except Exception as e:
        assert type(e).__name__ in UNSAID, e
        if type(e).__name__ == "MissingParameter":
            assert not operands(e.ctx, line) or line in SAID_BESIDE, e


def operands(context: typer.Context, line: str) -> list[object]:
    """What a line gives a command beside options."""
    words = shlex.split(line)[len(context.command_path.split()) :]
    given, _, order = context.command.make_parser(context).parse_args(words)
    return [given[p.name] for p in order if p.param_type_name == "argument" and given.get(p.name)]


def test_mentions_of_what_is_not_there_are_seen():
    assert len(mentions()) > 50
    for wrong in ("plait bake", "plait merge --mehtod x", "plait push merged user/merged"):
        with pytest.raises(AssertionError):
            test_what_sentences_mention_is_there("", wrong)


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_names_exist(page, text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "plait":
            for alias in node.names:
                assert hasattr(plait, alias.name), f"{page}: plait.{alias.name}"


def test_a_merge_of_classifiers_is_used_as_the_page_says(tiny_base, tmp_path, monkeypatch):
    import torch
    import transformers as hf

    from plait.adapters.peft_format import write_adapter
    from plait.merging import plan_merge
    from plait.merging.bake.baking import bake
    from plait.merging.folders import merge_folders
    from tests.panels import random_adapter

    monkeypatch.chdir(tmp_path)
    base = tiny_base("bert")
    adapters = [
        random_adapter(base, "bert", name, "classification", i, classes=2) for i, name in enumerate(("sst2", "rte"))
    ]
    for adapter in adapters:
        Path(adapter.name).mkdir()
        write_adapter(Path(adapter.name), adapter)
    merge_folders(["sst2", "rte"], Path("merged"), method="task_arithmetic", scale=1.0)
    text = next(t for page, t in blocks("python") if page == "loading.md" and "load_head" in t)
    names: dict = {}
    exec(compile(text.replace("path/to/base", base.name), "loading.md", "exec"), names)
    row = {"input_ids": torch.tensor([[0, 7, 9, 11, 2]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    logits = names["model"].eval()(**row).logits
    bake(plan_merge(adapters, "task_arithmetic", scale=1.0), Path(base.name), Path("full"))
    whole = hf.AutoModelForSequenceClassification.from_pretrained("full", num_labels=2).eval()
    bare = hf.AutoModelForSequenceClassification.from_pretrained(base.name, num_labels=2).eval()
    for model in (whole, bare):
        assert not model.load_state_dict(adapters[0].heads["sst2"], strict=False).unexpected_keys
    torch.testing.assert_close(logits, whole(**row).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, bare(**row).logits, atol=1e-3)
