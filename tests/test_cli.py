"""The command line: light to start, one object with --json, one line an error, the right exit code, anywhere."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml

from plait.cli import app, main, output
from plait.errors import EnvironmentFault, InputError, RunError, UsageError
from plait.progress import Progress, duration
from tests.conftest import tiny_raw

PLAIT = [sys.executable, "-m", "plait"]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "pydantic",
    "yaml",
    "numpy",
    "scipy",
    "sklearn",
    "pyarrow",
    "datasets",
    "matplotlib",
)


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


@pytest.fixture
def recipe_file(tiny_base, tmp_path) -> Path:
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic", "grade"])
    raw |= {"arms": ["osrm"], "merges": ["task_arithmetic"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import plait", "import sys; sys.argv = ['plait', '--help']; import plait.__main__"])
def test_starting_imports_nothing_heavy(code):
    report = f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    ended = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0 and ended.stderr == "[]\n"


def test_every_public_name_can_be_imported():
    import plait as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def commands() -> list[tuple[str, ...]]:
    group = typer.main.get_command(app)
    found = [(name,) for name in group.commands]  # type: ignore[attr-defined]
    return found + [("stats", name) for name in group.commands["stats"].commands]  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself_and_fails_with_one_object(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = call(capsys, *command, "--help")
    assert (code, err) == (0, "") and out.startswith("Usage: plait")
    assert all(len(line) <= 80 for line in out.splitlines())
    code, out, err = call(capsys, *command, "--json", "--no-such-option")
    assert code == 2 and one_object(out)["error"]["kind"] == "UsageError"
    assert err.count("\n") == 1 and err.startswith("error: ") and "--no-such-option" in err
    assert list(tmp_path.iterdir()) == []


# --- what is wrong, in one line ---------------------------------------------------------------------------------------

WRONG = {
    "Did you mean 'run'": ["rnu"],
    "--method": ["merge", "a", "--methd", "x", "--out", "o"],
    "plait cp demo.yaml .": ["run", "dem.yml"],
    "did you mean 'merges'": ["ls", "merge"],
    "Missing argument": ["run"],
    "is not a list of numbers": ["merge", "a", "--weights", "1,x", "--out", "o"],
    "must be finite": ["merge", "a", "--weights", "1,nan", "--out", "o"],
    "is not key=value": ["merge", "a", "--set", "density", "--out", "o"],
    "which base model?": ["train", "a", "--task", "sst2", "--out", "o"],
    "where to?": ["stats"],
}


@pytest.mark.parametrize("advice", WRONG)
def test_mistakes_are_named_with_advice(capsys, tmp_path, monkeypatch, advice):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *WRONG[advice], "--json")
    assert code in (2, 3) and err.count("\n") == 1 and advice in err
    error = one_object(out)["error"]
    assert error["exit_code"] == code and advice in f"{error['what']} {error['hint']}"
    assert list(tmp_path.iterdir()) == []


FAULTS = [
    (RunError("x"), 1),
    (UsageError("x"), 2),
    (InputError("x"), 3),
    (EnvironmentFault("x"), 4),
    (OSError(errno.ENOSPC, "No space left on device"), 4),
    (MemoryError("x"), 4),
    (RuntimeError("basic_ios::clear: iostream error"), 4),
    (RuntimeError("CUDA out of memory: x"), 4),
    (ModuleNotFoundError("No module named 'ray'", name="ray"), 4),
    (ValueError("x"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(
    ("error", "code"), FAULTS, ids=lambda x: type(x).__name__ if not isinstance(x, int) else str(x)
)
def test_exit_codes(capsys, error, code):
    def fail() -> int:
        raise error

    assert output.guarded(fail, debug=False, as_json=True) == code
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and one_object(said.out)["error"]["exit_code"] == code
    assert output.guarded(fail, debug=True, as_json=False) == code
    said = capsys.readouterr()
    assert said.out == "" and ("Traceback" in said.err) == (code != 130)


def test_foreign_text_cannot_write_to_the_terminal(capsys):
    def fail() -> int:
        raise InputError("bad \x1b[2J\r\nname", where="\x1b]0;title\x07", hint="x" * 9000)

    assert output.guarded(fail, debug=False, as_json=False) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "\x07" not in said and len(said) < 1500


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_commands_from_recipe_to_report(capsys, recipe_file, tmp_path):
    out = tmp_path / "Ergebnisse für später"  # a space and non-ASCII in the path
    assert one_object(call(capsys, "validate", recipe_file, "--json")[1])["valid"]
    planned = one_object(call(capsys, "plan", recipe_file, "--out", out, "--json")[1])
    assert planned["adapters"] == 2 and not out.exists()
    code, said, err = call(capsys, "run", recipe_file, "--out", out, "--json")
    found = one_object(said)
    assert code == 0 and Path(found["report"]).is_file() and "adapter osrm topic" in err and "\x1b" not in err
    code, said, err = call(capsys, "run", recipe_file, "--out", out, "--quiet")
    assert code == 0 and "recovered" in said and str(found["report"]) in said and err == ""
    code, said, _ = call(capsys, "run", recipe_file, "--out", out, "--set", "lora.rank=3", "--json")
    assert code == 2 and "rank: 2 -> 3" in one_object(said)["error"]["what"]
    again = one_object(call(capsys, "report", out, "--json")[1])
    assert again["merged"] == found["merged"]
    adapters = [f"{t}={out}/adapters/osrm/seed-0/{t}" for t in ("topic", "grade")]
    merged = one_object(call(capsys, "merge", *adapters, "--method", "ties", "--out", tmp_path / "m", "--json")[1])
    assert merged["tasks"] == ["topic", "grade"] and Path(merged["output"]).is_dir()
    code, said, _ = call(capsys, "merge", *adapters, "--out", tmp_path / "m", "--json")
    assert code == 2 and "exists" in one_object(said)["error"]["what"]
    scored = one_object(call(capsys, "eval", tmp_path / "m", "--recipe", recipe_file, "--scales", "0.5,1", "--json")[1])
    assert set(scored["adapters"][0]["tasks"]) == {"topic", "grade"}
    statistics = [out / f"statistics/seed-0/{t}.stats.safetensors" for t in ("topic", "grade")]
    begun = call(
        capsys,
        "init",
        "--own",
        statistics[0],
        "--others",
        statistics[1],
        "--rank",
        2,
        "--out",
        tmp_path / "i",
        "--json",
    )
    assert one_object(begun[1])["others"] == ["grade"]
    assert one_object(call(capsys, "stats", "show", statistics[0], "--json")[1])["sites"]
    trained = call(
        capsys, "train", tmp_path / "i", "--task", "topic", "--recipe", recipe_file, "--out", tmp_path / "t", "--json"
    )
    assert one_object(trained[1])["task"] == "topic"
    code, said, _ = call(capsys, "merge", *adapters, "--method", "tis", "--out", tmp_path / "m2", "--json")
    assert code == 2 and "did you mean 'ties'" in one_object(said)["error"]["hint"]
    collected = call(
        capsys,
        "stats",
        "--task",
        "topic",
        "--recipe",
        recipe_file,
        "--out",
        tmp_path / "topic.stats.safetensors",
        "--json",
    )
    assert one_object(collected[1])["samples"] == 16


@pytest.mark.parametrize("command", ["ls", "cp"])
def test_lists_and_copies(capsys, tmp_path, command):
    if command == "ls":
        found = one_object(call(capsys, "ls", "--json")[1])
        assert {m["name"] for m in found["merges"]} >= {"task_arithmetic", "ties"} and found["recipes"]
        assert "ties" in call(capsys, "ls", "merges")[1]
        return
    assert one_object(call(capsys, "cp", "demo", tmp_path, "--json")[1])["output"] == str(tmp_path / "demo.yaml")
    assert call(capsys, "cp", "demo.yaml", tmp_path / "mine.yaml")[0] == 0
    code, out, _ = call(capsys, "cp", "demo", tmp_path, "--json")
    assert code == 2 and "exists" in one_object(out)["error"]["what"]
    assert call(capsys, "cp", "nothing", tmp_path)[0] == 3


# --- odd surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surroundings", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "40"}, {"TERM": "dumb"}]
)
def test_odd_surroundings(surroundings):
    ended = plait("ls", "tasks", env={**os.environ, **surroundings})
    assert ended.returncode == 0 and "sst2" in ended.stdout and ended.stderr == ""


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 2), ("2>&-", 2), (">&- 2>&-", 2), ("> /dev/full", 2), ("2> /dev/full", 2)]
)
def test_closed_and_full_streams_change_no_exit_code(redirection, code):
    line = f"'{sys.executable}' -m plait ls nothing --json {redirection}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code and "Traceback" not in ended.stderr and "Exception" not in ended.stderr


def test_a_reader_that_goes_away_is_no_error():
    line = f"'{sys.executable}' -m plait ls --json | head -c 10; echo ${{PIPESTATUS[0]}} >&2"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == '{"schema":' and ended.stderr == "0\n"


def test_a_full_stdout_is_a_fault_of_the_environment():
    ended = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m plait ls tasks > /dev/full"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 4 and "No space left" in ended.stderr and ended.stderr.count("\n") == 1


def test_a_name_that_is_no_unicode():
    ended = subprocess.run(
        [*map(os.fsencode, PLAIT), b"run", b"\xff\x1b.yaml"], capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 3 and b"\x1b" not in ended.stderr and b"no such recipe" in ended.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted(recipe_file, tmp_path, times):
    out = tmp_path / "out"
    running = subprocess.Popen(
        [*PLAIT, "run", str(recipe_file), "--out", str(out), "--json", "--set", "training.steps=500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 100
    while not list(out.rglob(".*.checkpoints")) and time.monotonic() < end and running.poll() is None:
        time.sleep(0.02)
    for _ in range(times):
        running.send_signal(signal.SIGINT)
        time.sleep(0.05)
    said, err = running.communicate(timeout=60)
    assert running.returncode == 130 if times == 1 else running.returncode in (130, -signal.SIGINT)
    if times == 1:
        assert one_object(said)["error"]["exit_code"] == 130
        assert "interrupted; run the same command again" in err and "Traceback" not in err
    assert not list(out.rglob("*.staging")) or times == 2


def test_an_output_that_cannot_be_made(capsys, recipe_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, said, _ = call(capsys, "run", recipe_file, "--out", tmp_path / "file/out", "--json")
    assert code == 4 and str(tmp_path / "file/out") in one_object(said)["error"]["where"]
    assert (tmp_path / "file").read_text() == "mine"


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_on_a_terminal_rewrites_its_line_and_survives_a_closed_stream():
    terminal = Terminal()
    progress = Progress(10.0, 2, stream=terminal)  # type: ignore[arg-type]
    progress.start("train", 5.0)
    progress.finish()
    progress.close("done")
    assert (
        terminal.text.startswith("\r\x1b[2K[1/2] train")
        and "left" in terminal.text
        and terminal.text.endswith("done\n")
    )
    with Path(os.devnull).open("w") as closed:
        pass
    for stream in (closed, None):
        progress = Progress(1.0, 1, stream=stream)
        if stream is None:
            progress.start("x", 1.0)
        progress.close("done")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
