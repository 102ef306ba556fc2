"""--overwrite replaces what plait wrote and nothing else: no input, no folder of somebody's, nothing above the working directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from plait.disk.manifest import MANIFEST
from plait.disk.overwriting import require_apart, require_replaceable
from plait.disk.store import discard, is_done, staged_file
from plait.errors import EnvironmentFault, UsageError
from tests.command import call, one_object
from tests.conftest import resealed
from tests.test_manifest import a_folder
from tests.test_store import NEW, OLD, content, left_over, make, whole


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapter folders of plait's."""
    return a_folder(tmp_path / "a", heads=0), a_folder(tmp_path / "b", heads=0)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def merge(capsys, *arguments: object) -> tuple[int, dict]:
    code, said, err = call(capsys, "merge", *arguments, "--overwrite", "--json")
    assert "Traceback" not in err
    return code, one_object(said)


# --- what stands there ------------------------------------------------------------------------------------------------


def _a_link(path: Path) -> None:
    make(path.parent / "target")
    path.symlink_to(path.parent / "target")


def _a_thesis(path: Path) -> None:
    path.mkdir()
    (path / "thesis").write_text("years")


def _a_result_with(name: str):
    def stands(path: Path) -> None:
        make(path)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("years")

    return stands


STANDS = {
    "a folder of somebody's": _a_thesis,
    "a file": lambda p: p.write_text("years"),
    "a link to a result": _a_link,
    "a dead link": lambda p: p.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a result with a thesis in it": _a_result_with("thesis"),
    "a result with a repository in it": _a_result_with(".git/HEAD"),
    "another manifest": lambda p: (p.mkdir(), (p / MANIFEST).write_text('{"name": "mine", "version": 1}')),
    "an empty manifest": lambda p: (p.mkdir(), (p / MANIFEST).write_text("")),
}


@pytest.mark.parametrize("stands", STANDS)
def test_what_plait_did_not_write_is_not_replaced(tmp_path, capsys, pair, stands):
    out = tmp_path / "out"
    STANDS[stands](out)
    before = tree(tmp_path) if stands != "a pipe" else None
    for call_it in (lambda: is_done(out, NEW, overwrite=True), lambda: make(out, NEW, "new", overwrite=True)):
        with pytest.raises(UsageError) as raised:
            call_it()
        assert str(out) in str(raised.value) and raised.value.hint
    code, found = merge(capsys, *pair, "--out", out)
    assert code == 2 and str(out) in found["error"]["where"]
    assert left_over(tmp_path) == [] and (before is None or tree(tmp_path) == before)


def test_a_device_is_not_replaced(tmp_path):
    try:
        os.mknod(tmp_path / "device", 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    with pytest.raises(UsageError, match="a device or socket"):
        make(tmp_path / "device", NEW, "new", overwrite=True)
    with pytest.raises(UsageError, match="a device or socket"), staged_file(tmp_path / "device", overwrite=True):
        pass
    assert (tmp_path / "device").is_char_device()


@pytest.mark.parametrize(
    "change",
    [
        lambda out: (out / "a").unlink(),
        lambda out: (out / "a").write_text("damaged"),
        lambda out: (out / "README.md").write_text("a card"),
        lambda out: (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes().replace(b'"stage"', b'"stagf"')),
        lambda out: (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes()[:-3]),
        lambda out: resealed(out, schema=2),
    ],
)
def test_what_plait_wrote_is_replaced_whole_or_damaged(tmp_path, change):
    out = make(tmp_path / "out")
    change(out)
    make(out, NEW, "new", overwrite=True)
    assert content(out) == {"new"} and is_done(out, NEW, read=True) and left_over(tmp_path) == []


def test_a_stage_left_by_a_killed_run_and_an_empty_folder_are_replaced(tmp_path):
    (tmp_path / ".out.staging").mkdir()
    (tmp_path / ".out.staging/a").write_text("half")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", NEW, "new", overwrite=True)
    assert content(tmp_path / "out") == {"new"} and left_over(tmp_path) == []


# --- where it stands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [".", "..", "../..", "{here}", "{above}", "../here", "link"])
def test_the_working_directory_and_what_holds_it_are_not_replaced(tmp_path, monkeypatch, capsys, pair, out):
    here = tmp_path / "above/here"
    here.parent.mkdir()
    make(here)  # a result of plait's, and one stands in it
    (tmp_path / "above/link").symlink_to(here)
    monkeypatch.chdir(here)
    given = out.format(here=here, above=here.parent).replace("link", str(tmp_path / "above/link"))
    before = tree(tmp_path)
    code, found = merge(capsys, *pair, "--out", given)
    what = found["error"]["what"]
    assert code == 2 and any(words in what for words in ("working directory", "link", "an input of this command"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", ["itself", "relative", "through a link", "a hard way round", "above it", "inside it"])
def test_an_input_is_not_replaced(tmp_path, monkeypatch, capsys, pair, way):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "link").symlink_to(pair[0])
    outs = {
        "itself": pair[0],
        "relative": Path("../a"),
        "through a link": tmp_path / "link",
        "a hard way round": tmp_path / "sub/../b/../a",
        "above it": tmp_path,
        "inside it": pair[1] / "merged",
    }
    before = tree(tmp_path)
    code, found = merge(capsys, f"one={pair[0]}", pair[1], "--out", outs[way])
    assert code == 2 and found["error"]["hint"] and tree(tmp_path) == before
    if way == "through a link":  # the input through the link, the output its folder
        code, found = merge(capsys, tmp_path / "link", pair[1], "--out", pair[0])
        assert code == 2 and "input" in found["error"]["what"] and tree(tmp_path) == before


def test_inputs_of_other_kinds_are_kept_apart(tmp_path):
    (tmp_path / "file").write_text("x")
    os.link(tmp_path / "file", tmp_path / "same")
    for out in ("file", "same"):
        with pytest.raises(UsageError, match="is an input"):
            require_apart(tmp_path / out, [tmp_path / "file"])
    require_apart(tmp_path / "other", [tmp_path / "file", tmp_path / "absent", ""])
    require_apart(tmp_path / "plain/out", [tmp_path / "plain"])
    (tmp_path / "plain").mkdir()
    require_apart(tmp_path / "plain/out", [tmp_path / "plain"])  # a folder that is not plait's may be written into


def test_a_result_takes_no_other_inside_it(tmp_path, capsys, pair):
    """Its manifest lists every file: with another one in it, it would count as damaged, and nothing could be done with it."""
    assert merge(capsys, *pair, "--out", tmp_path / "merged")[0] == 0
    before = tree(tmp_path)
    for out in (tmp_path / "merged" / "again", tmp_path / "merged" / "deep" / "again"):
        code, found = merge(capsys, *pair, "--out", out)
        assert code == 2 and "another result, which would not be whole any more" in found["error"]["what"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["convert", "per-task", "edit"])
def test_other_commands_keep_their_inputs(tmp_path, capsys, pair, command):
    if command == "edit":
        assert call(capsys, "merge", *pair, "--out", tmp_path / "m")[0] == 0
    before = tree(tmp_path)
    arguments = {
        "convert": ("convert", pair[0], "--to", "peft", "--out", pair[0]),
        "per-task": ("merge", *pair, "--per-task", "--out", pair[1]),
        "edit": ("edit", tmp_path / "m", "--remove", "a", "--out", tmp_path / "m"),
    }[command]
    code, said, _ = call(capsys, *arguments, "--overwrite", "--json")
    assert code == 2 and "input" in one_object(said)["error"]["what"] and tree(tmp_path) == before


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_others_are_not_replaced(tmp_path, capsys, pair):
    from plait.formats.convert import convert

    lora, to = tmp_path / "lora.safetensors", ("--to", "diffusers", "--component", "unet")
    convert(pair[0], lora, to="diffusers", component="unet")
    other = tmp_path / "other.safetensors"
    shutil.copyfile(pair[0] / "adapter_model.safetensors", other)
    notes = tmp_path / "notes.safetensors"
    notes.write_text("mine")
    before = tree(tmp_path)
    for path in (other, notes):
        code, said, _ = call(capsys, "convert", pair[0], *to, "--out", path, "--overwrite", "--json")
        assert code == 2 and "not written by this command" in one_object(said)["error"]["what"]
    assert tree(tmp_path) == before
    assert call(capsys, "convert", pair[1], *to, "--dtype", "float16", "--out", lora, "--overwrite")[0] == 0
    assert lora.read_bytes() != before["lora.safetensors"]


def test_a_file_is_replaced_where_the_command_knows_it(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("mine")
    with (
        pytest.raises(UsageError, match="not written by this command"),
        staged_file(path, overwrite=True, ours=lambda p: False),
    ):
        pass
    assert path.read_text() == "mine"
    with staged_file(path, overwrite=True, ours=lambda p: p.read_text() == "mine") as stage:
        stage.write_text("new")
    assert path.read_text() == "new"
    path.write_text("")  # nothing is lost with it
    with staged_file(path, overwrite=True, ours=lambda p: False) as stage:
        stage.write_text("newer")
    assert path.read_text() == "newer" and left_over(tmp_path) == []


# --- what was there comes back ----------------------------------------------------------------------------------------


def test_what_is_replaced_comes_back_where_the_last_rename_fails(tmp_path, monkeypatch):
    out = make(tmp_path / "out")
    real, calls = Path.rename, []

    def fails(self, target):
        calls.append(str(target))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(EnvironmentFault, match="No space left"):
        make(out, NEW, "new", overwrite=True)
    monkeypatch.undo()
    assert len(calls) == 3 and whole(out) == "old" and left_over(tmp_path) == []


def test_a_unit_is_discarded_where_it_is_plaits(tmp_path):
    out = make(tmp_path / "out")
    (out / MANIFEST).unlink()
    with pytest.raises(UsageError, match="no manifest"):
        require_replaceable(out)
    discard(out)
    assert not out.exists() and left_over(tmp_path) == []
    discard(out)
    (make(out) / "thesis").write_text("years")
    with pytest.raises(UsageError, match="thesis"):
        discard(out)
    assert (out / "thesis").read_text() == "years" and json.loads((out / MANIFEST).read_text())["stage"] == OLD["stage"]
