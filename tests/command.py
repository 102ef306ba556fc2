"""The command line as tests call it: in a process of its own, or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli import main

PLAIT = [sys.executable, "-m", "plait"]


def plait(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    options.setdefault("env", {**os.environ})
    return subprocess.run(
        [*PLAIT, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def call(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def one_object(text: str) -> dict:
    assert text.count("\n") == 1 and text.endswith("\n")
    found = json.loads(text)
    assert found["schema"] == 1
    return found


def done(capsys, *arguments) -> dict:
    """What a command that has to end well prints as JSON."""
    with pytest.raises(SystemExit) as ended:
        main([*(str(a) for a in arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0, found
    return found
