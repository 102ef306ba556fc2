"""Nothing reaches the network that was not asked to: commands run in a process whose connections are refused and counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait.disk.store import identity, staged_folder
from plait.model.base import BaseModel
from tests.conftest import tiny_raw, tiny_rows, write_rows
from tests.panels import random_adapter

SOURCE = Path(__file__).parents[1] / "src"
# Python imports this before anything else: every connection and look-up of a name is written down and refused.
GUARD = """
import os, socket

def refuse(what, address):
    with open(os.environ["GUARD_LOG"], "a") as log:
        log.write(f"{what} {address}\\n")
    raise OSError(101, "refused by the test")

def guarded(name):
    original = getattr(socket.socket, name)
    def connect(self, address, *rest):
        if self.family == socket.AF_UNIX:
            return original(self, address, *rest)
        refuse(name, address)
    return connect

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(name))
socket.getaddrinfo = lambda host, *rest, **more: refuse("getaddrinfo", host)
"""
DRIVER = """
import json, sys
from plait.cli import main
for command in json.load(open(sys.argv[1])):
    try:
        main(command)
    except SystemExit as e:
        print("exit", e.code or 0, " ".join(command[:2]), flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """run(commands) -> (exit codes, what they said, connections that were tried); without HF_HUB_OFFLINE."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "driver.py").write_text(DRIVER)
    log = tmp_path / "connections"

    def call(commands: list[list[Any]], cwd: Path | None = None) -> tuple[list[int], str, str]:
        log.write_text("")
        (tmp_path / "commands.json").write_text(json.dumps([[str(a) for a in c] for c in commands]))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        surroundings = kept | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "guard"), str(SOURCE)]),
            "GUARD_LOG": str(log),
            "HF_HOME": str(tmp_path / "hf"),
        }
        done = subprocess.run(
            [sys.executable, "-P", tmp_path / "driver.py", tmp_path / "commands.json"],
            env=surroundings, cwd=cwd or tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("exit ")]
        assert len(codes) == len(commands), said
        return codes, said, log.read_text()

    return call


@pytest.fixture
def adapters(tmp_path, tiny_base):
    """Two trained adapters that name a base of the hub."""
    from plait.adapters.peft_format import write_adapter

    made = []
    for seed, name in enumerate(("a", "b")):
        adapter = random_adapter(BaseModel(tiny_base("bert").name, device="cpu"), "bert", name, "classification", seed)
        object.__setattr__(adapter, "base", "some-org/some-base")
        with staged_folder(tmp_path / name, identity("adapter", {}), result={"task": name}) as stage:
            write_adapter(stage, adapter)
        made.append(tmp_path / name)
    return made


def test_local_inputs_ask_nothing_of_the_network(run, adapters, tmp_path, tiny_base):
    base, (one, two) = tiny_base("bert").name, adapters
    commands = [
        ["inspect", one],
        ["advise", one, two],
        ["convert", one, "--out", tmp_path / "converted"],
        ["merge", one, two, "--out", tmp_path / "m"],
        ["merge", one, two, "--bake", base, "--out", tmp_path / "baked"],
        ["edit", tmp_path / "m", "--weight", "a=0.5", "--out", tmp_path / "edited"],
        ["compare", one, two],
        ["check", one],
        ["export", tmp_path / "m", "--for", "peft", "--task", "a", "--out", tmp_path / "exported"],
        ["extract", tmp_path / "baked", "--base", base, "--rank", "2", "--out", tmp_path / "cut"],
        [
            "try",
            tmp_path / "m",
            "--base",
            base,
            "--prompt",
            "w1 w2",
            "--device",
            "cpu",
            "--out",
            tmp_path / "page.html",
        ],
        ["push", one, "--to", "me/x", "--dry-run"],
        ["doctor"],
        ["schema"],
        ["ls", "merges"],
        ["cp", "demo", tmp_path / "demo.yaml"],
        ["completion", "bash"],
    ]
    codes, said, tried = run(commands)
    assert codes == [0] * len(commands), said
    assert tried == ""


def test_what_a_record_names_on_the_hub_is_not_fetched_on_its_word(run, adapters, tmp_path):
    """Adapters that name a base of the hub, and a merge whose adapters are gone: nobody asked for these."""
    one, two = adapters
    codes, said, tried = run([["merge", one, two, "--out", tmp_path / "m"], ["try", tmp_path / "m", "--prompt", "x"]])
    assert codes == [0, 3] and "neither a folder here nor in the hub's cache" in said
    assert tried == ""


@pytest.mark.slow
def test_stages_on_local_inputs_ask_nothing_of_the_network(run, adapters, tmp_path, tiny_base):
    base, (one, two) = tiny_base("bert").name, adapters
    rows = write_rows(tmp_path / "rows.csv", tiny_rows(3, 16))
    task = ["--base", base, "--train-file", rows, "--text", "text", "--device", "cpu"]
    stats, other = (tmp_path / f"{n}.stats.safetensors" for n in "ab")
    steps = ["--set", "training.steps=2", "--set", "training.checkpoint_every=1"]
    texts = [part for n in "ab" for part in ("--text", f"{n}={rows}:text")]
    recipe = tmp_path / "recipe.yaml"
    raw = tiny_raw(BaseModel(base, device="cpu"), "bert", tmp_path / "data")
    recipe.write_text(yaml.safe_dump(raw))
    commands = [
        ["advise", base, one, two, "--device", "cpu"],
        ["merge", "auto", one, two, "--out", tmp_path / "auto"],
        ["stats", *task, "--task", "a", "--out", stats],
        ["stats", *task, "--task", "b", "--out", other],
        ["init", "--own", stats, "--out", tmp_path / "start", "--method", "kaiming"],
        ["train", tmp_path / "start", *task, "--task", "a", *steps, "--out", tmp_path / "trained"],
        ["train", one, *task, "--task", "a", *steps, "--out", tmp_path / "longer"],
        ["eval", one, *task, "--task", "a"],
        ["plan", recipe, "--out", tmp_path / "run"],
        ["validate", recipe],
        ["run", recipe, "--out", tmp_path / "run"],
        ["report", tmp_path / "run"],
        ["report", tmp_path / "run", tmp_path / "run", "--to", tmp_path / "both"],
        ["post", tmp_path / "trained", "--own", stats, "--others", other, "--out", tmp_path / "posted"],
        ["merge", base, one, two, "--method", "featcal", *texts, "--out", tmp_path / "fitted"],
        ["new", tmp_path / "mine.yaml", "--base", base, *(f"--task={n}={rows}:text" for n in "ab")],
        ["measure", one, "--base", base, "--text", f"a={rows}:text", "--device", "cpu"],
    ]
    codes, said, tried = run(commands)
    assert codes == [0] * len(commands), said
    assert tried == ""


def test_offline_asks_nothing_whatever_is_named(run, adapters, tmp_path):
    ids = ["merge", "nobody/x", "nobody/y", "--out", tmp_path / "m"]
    described = ["--base", "nobody/base", "--task", "a", "--train-file", "rows.csv", "--text", "text"]
    rows = write_rows(tmp_path / "rows.csv", tiny_rows(3, 4))
    offline = [
        ["--offline", *ids],
        [*ids, "--offline"],
        ["inspect", "nobody/x", "--offline"],
        ["merge", *adapters, "--bake", "nobody/base@v1", "--out", tmp_path / "m", "--offline"],
        ["stats", *described, "--out", tmp_path / "s", "--offline"],
        ["advise", "nobody/base", *adapters, "--offline"],
        ["try", "nobody/x", "--prompt", "a", "--offline"],
        ["try", adapters[0], "--base", "nobody/base", "--prompt", "a", "--offline"],
        ["compare", "nobody/x", "nobody/y", "--offline"],
        ["measure", "nobody/x", "--text", f"a={rows}:text", "--offline"],
        ["check", "nobody/x", "--offline"],
        ["export", "nobody/x", "--for", "peft", "--out", tmp_path / "e", "--offline"],
        [
            "new",
            tmp_path / "r.yaml",
            "--base",
            "nobody/base",
            "--task",
            "a=a.csv:x",
            "--task",
            "b=b.csv:x",
            "--offline",
        ],
    ]
    codes, said, tried = run(offline)
    assert codes == [3] * len(offline), said
    assert tried == ""
    assert "cannot be reached" not in said and "hf download nobody/x" in said
    codes, said, tried = run([["push", adapters[0], "--to", "me/x", "--offline"]])
    assert codes == [2] and "--offline" in said and tried == ""
    codes, said, tried = run([ids])  # the same is asked of the hub without it: the guard does see
    assert codes == [3] and "the hub cannot be reached" in said
    assert "huggingface.co" in tried


# What stands in no list above: the engine of `run`, done in other processes or by a scheduler; and what a demo needs comes with a package.
ELSEWHERE = {"study", "job", "demo"}


def test_every_command_is_walked():
    from typer.main import get_command

    from plait.cli import app

    walked = set(re.findall(r'^        \["([a-z]+)"', Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert set(get_command(app).commands) <= walked | ELSEWHERE  # type: ignore[attr-defined]
