"""Every command's help ends in examples, and what stands there runs: typed in a folder of tiny adapters, files and recipes."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
import yaml

from plait.adapters.peft_format import write_adapter
from plait.cli import app, main
from plait.cli.examples import EXAMPLES
from plait.cli.groups import OTHER, group_of
from plait.cli.help import MANY
from tests.conftest import tiny_rows, write_rows
from tests.panels import random_adapter
from tests.tiny import save_model

# What is parsed and not run, with the reason.
PARSED_ONLY = {
    "plait export merged --for gguf": "llama.cpp knows no classifiers of BERT; tests/formats exports decoders",
    "plait demo --out plait-demo": "takes minutes; tests/test_pipeline.py runs it",
    "plait study run glue8-mpnet": "needs GLUE and a base of 110 M",
    "plait push merged --to user/merged --base user/base --private": "needs the hub; tests/hub has one of its own",
}
# Examples that need no run, in the order in which they build on each other; and those about whole runs.
BY_HAND = (
    "doctor", "completion", "ls", "cp", "schema", "new", "validate", "stats", "stats show", "stats merge", "stats diff",
    "stats compress", "stats check", "init", "train", "post", "merge", "inspect", "convert", "compare", "advise", "edit",
    "extract", "export", "check", "eval", "stats fisher", "try", "measure", "push",
)  # fmt: skip
WHOLE = (
    "new", "plan", "run", "report", "study", "study run", "study table", "study archive", "job list", "job", "job run", "demo",
)  # fmt: skip


def commands() -> dict[str, object]:
    """Every command and group of commands that has a help page, by what is typed for it."""
    root = typer.main.get_command(app)
    found: dict[str, object] = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        found[name] = command
        found |= {f"{name} {inner}": c for inner, c in getattr(command, "commands", {}).items()}
    return found


def typed(command: str) -> list[str]:
    """The command lines of an example, comments and the shell's own `> FILE` left out."""
    lines = EXAMPLES[command].replace("\\\n", " ").splitlines()
    return [line.partition(" > ")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def words(line: str) -> list[str]:
    program, *rest = shlex.split(line)
    assert program == "plait"
    return rest


def spared(line: str) -> bool:
    return any(line.startswith(start) for start in PARSED_ONLY)


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """base, a fine-tune of it, adapters `reviews` and `pairs`, and their files."""
    save_model(tmp_path / "base", "bert")
    model = __import__("transformers").BertModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("query.weight"):
                p += 0.05 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])
    shutil.copytree(tmp_path / "base", tmp_path / "finetuned")
    model.save_pretrained(tmp_path / "finetuned")
    monkeypatch.chdir(tmp_path)
    reviews = [{"review": r["text"], "sentiment": ["bad", "good"][r["label"]]} for r in tiny_rows(2, 40)]
    write_rows(Path("reviews.csv"), reviews)
    pairs = [{"premise": r["text"], "hypothesis": r["other"], "label": r["label"]} for r in tiny_rows(3, 40, pair=True)]
    write_rows(Path("pairs.jsonl"), pairs)
    Path("prompts.txt").write_text("w1 w2 w3\nw4 w5\n")
    from plait.model.base import BaseModel

    base = BaseModel("base")
    for seed, (name, classes) in enumerate((("reviews", 2), ("pairs", 3))):
        Path(name).mkdir()
        write_adapter(Path(name), random_adapter(base, "bert", name, "classification", seed, classes=classes))
    return tmp_path


def run(capsys, command: str) -> list[str]:
    """Type a command's examples; returns what failed."""
    wrong = []
    for line in (x for x in typed(command) if not spared(x)):
        with pytest.raises(SystemExit) as ended:
            main(words(line))
        said = capsys.readouterr()
        if ended.value.code:
            wrong.append(f"{line}\n    exit {ended.value.code}: {said.err[-600:]}")
        if command == "new":
            lighten(Path("my.yaml"))
    return wrong


def lighten(path: Path) -> None:
    """The recipe that was written, with less to do; and a study of it."""
    raw = yaml.safe_load(path.read_text())
    raw |= {"training": {"steps": 2, "batch_size": 8, "lr": 0.01}, "merges": ["tsv"], "statistics": {"samples": 16}}
    raw["evaluation"] = {"scales": [0.5, 1.0], "resamples": 20}
    path.write_text(yaml.safe_dump(raw))
    study = {**raw, "name": "study", "arms": ["kaiming", "gaussian"], "rates": [0.01, 0.02], "tuning_rows": 2}
    Path("study.yaml").write_text(yaml.safe_dump(study))


def test_examples_about_adapters_run(capsys, world):
    assert [failure for command in BY_HAND if command in EXAMPLES for failure in run(capsys, command)] == []


def test_examples_about_whole_runs_run(capsys, world):
    assert [failure for command in WHOLE for failure in run(capsys, command)] == []


def test_every_command_has_examples_that_are_run():
    assert set(commands()) == set(EXAMPLES) == set(BY_HAND) | set(WHOLE)


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_every_example_parses_and_stands_in_the_help(capsys, command):
    known = commands()
    for line in typed(command):
        rest = words(line)
        assert " ".join(rest[:2]).startswith(command) or command in ("study", "job")
        node, context = typer.main.get_command(app), None
        while hasattr(node, "resolve_command"):
            context = node.make_context("plait", list(rest), parent=context)  # type: ignore[attr-defined]
            inner = [*context._protected_args, *context.args]
            if not inner:
                break
            name, node, rest = node.resolve_command(context, inner)  # type: ignore[attr-defined]
            if not hasattr(node, "resolve_command"):
                context = node.make_context(name, list(rest), parent=context)
        assert not context.args
    assert known[command].epilog == EXAMPLES[command]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "Examples:" in (out := capsys.readouterr().out)
    assert all(f"  {line}".rstrip() in out for line in EXAMPLES[command].splitlines())


def test_options_stand_in_groups_where_there_are_many(capsys):
    for name, command in commands().items():
        options = [p for p in command.params if p.param_type_name == "option"]  # type: ignore[attr-defined]
        lost = [p.opts for p in options if group_of(p.opts) == OTHER and p.name != "help"]
        assert not lost or len(options) <= MANY, (name, lost)
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    out = capsys.readouterr().out
    assert (
        out.index("What goes in:")
        < out.index("How it is done:")
        < out.index("What comes out:")
        < out.index("Examples:")
    )
    assert "<" not in out.partition("Arguments:")[2].partition("Examples:")[0] and "FOLDERS..." in out.splitlines()[0]
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "What comes out:" not in capsys.readouterr().out


# --- completion and doctor --------------------------------------------------------------------------------------------


def test_a_shell_is_told_what_may_come_next(capsys, monkeypatch):
    for line, number, wanted in (
        ("plait mer", 1, "merge"),
        ("plait merge --metho", 2, "--method"),
        ("plait stats sh", 2, "show"),
    ):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(number))
        monkeypatch.setenv("_PLAIT_COMPLETE", "complete_bash")
        with pytest.raises(SystemExit) as ended:
            main([])
        assert ended.value.code == 0 and capsys.readouterr().out.split() == [wanted]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_a_shell_gets_its_script(capsys, shell):
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0 and f"_PLAIT_COMPLETE=complete_{shell}" in capsys.readouterr().out.replace(
        ' = "', "="
    ).replace("$Env:", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script(tmp_path):
    import subprocess
    import sys

    program = tmp_path / "plait"
    program.write_text(f"#!{sys.executable}\nfrom plait.entry import main\nmain()\n")
    program.chmod(0o755)
    text = 'eval "$(plait completion bash)"; COMP_WORDS=(plait insp); COMP_CWORD=1; _plait_completion plait; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert ended.stdout.strip() == "inspect"


def test_the_doctor_tells_versions_and_nothing_private(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "/home/somebody/secret")
    with pytest.raises(SystemExit), contextlib.suppress(KeyboardInterrupt):
        main(["doctor", "--json"])
    import json

    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == version("torch") and found["cores"] >= 1
    assert found["environment"]["HF_HOME"] == "set"
    assert "somebody" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


def test_the_doctor_knows_what_does_not_fit(monkeypatch):
    from plait.checking import doctor

    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch==2.12.1"] if name == "torchvision" else [])
    told = list(doctor._mismatched(versions))
    assert [t.split(" ")[0] for t in told] == ["torchvision", "torchvision"]
    assert "built for torch==2.12.1, not 2.13.0+cpu" in told[0] and "of two builds" in told[1]
    assert list(doctor.unmet(["peft>=0.18", "x"], {"peft": "0.18.1"})) == ["x is not installed: pip install 'x'"]


def test_the_doctor_ends_with_4_where_something_is_wrong(capsys, monkeypatch):
    from plait.checking import doctor

    monkeypatch.setattr(doctor, "_unmet", lambda: iter(["peft is too old"]))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 4 and "problem: peft is too old" in capsys.readouterr().out


def test_examples_fit_a_terminal():
    assert all(len(line) <= 78 for text in EXAMPLES.values() for line in text.splitlines())
