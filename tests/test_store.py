"""Staged folders and files: the old result or the new one, never half of one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plait.disk import durable, locks, store
from plait.disk.store import MANIFEST, identity, is_done, read_manifest, staged_file, staged_folder
from plait.errors import EnvironmentFault, RunError, UsageError
from tests.conftest import unprivileged

OLD, NEW = identity("merge", {"scale": 1}), identity("merge", {"scale": 2})


def make(path: Path, wanted=OLD, text: str = "old", **options) -> Path:
    with staged_folder(path, wanted, **options) as stage:
        (stage / "a").write_text(text)
        (stage / "sub").mkdir()
        (stage / "sub/b").write_text(text)
    return path


def content(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "sub/b")}


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# --- the plain case ---------------------------------------------------------------------------------------------------


def test_a_folder_is_written_with_its_manifest_and_nothing_else(tmp_path):
    result = {"x": 1.5}
    make(tmp_path / "out", result=result)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["result"] == result and manifest["options"] == {"scale": 1}
    assert manifest["files"] == {n: store.sha256_file(tmp_path / "out" / n) for n in ("a", "sub/b")}
    assert manifest["versions"]["plait"] and left_over(tmp_path) == []
    assert is_done(tmp_path / "out", OLD)


def test_a_check_sees_the_written_folder_and_what_it_finds_is_recorded(tmp_path):
    result: dict = {}
    make(tmp_path / "out", result=result, check=lambda stage: result.update(seen=(stage / "sub/b").read_text()))
    assert read_manifest(tmp_path / "out")["result"] == {"seen": "old"}


def test_a_check_that_fails_leaves_what_was_there(tmp_path):
    out = make(tmp_path / "out")

    def refuse(stage: Path) -> None:
        raise RunError(f"{(stage / 'a').read_text()} is wrong")

    with pytest.raises(RunError, match="new is wrong"):
        make(out, NEW, "new", overwrite=True, check=refuse)
    assert content(out) == {"old"} and is_done(out, OLD) and left_over(tmp_path) == []


def test_other_settings_are_shown_and_overwrite_replaces(tmp_path):
    out = make(tmp_path / "out")
    with pytest.raises(UsageError, match=r"options\.scale: 1 -> 2"):
        is_done(out, NEW)
    assert not is_done(out, NEW, overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        make(out, NEW, "new")
    assert content(out) == {"old"}
    make(out, NEW, "new", overwrite=True)
    assert content(out) == {"new"} and is_done(out, NEW) and left_over(tmp_path) == []


def test_what_plait_did_not_finish_is_not_touched(tmp_path):
    folder, file, link, pipe = (tmp_path / n for n in ("folder", "file", "link", "pipe"))
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    for path in (folder, file, link, pipe):
        with pytest.raises(UsageError, match=r"not finished by plait \(choose another --out, or remove it yourself\)"):
            is_done(path, OLD)
        with pytest.raises(UsageError, match="exists"):
            make(path)
    assert (folder / "mine").read_text() == file.read_text() == "mine" and link.is_symlink() and pipe.is_fifo()
    (tmp_path / "empty").mkdir()
    assert not is_done(tmp_path / "empty", OLD)
    assert content(make(tmp_path / "empty")) == {"old"}


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "out", OLD) as stage:
            (stage / "a").write_text("a")
            (stage / "a").chmod(0o600)  # as safetensors leaves its files
        with staged_file(tmp_path / "file") as file:
            file.write_text("x")
            file.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    for path in (tmp_path / "out/a", tmp_path / "out" / MANIFEST, tmp_path / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


# --- crashes ----------------------------------------------------------------------------------------------------------

MOMENTS = ["_finish", "_settle", "_swap", "Path.rename:1", "Path.rename:2", "shutil.rmtree:last"]


def crash_at(moment: str, crash) -> None:
    """Patch the store in this process so that it crashes when it comes to a moment."""
    calls = {"n": 0}
    where, _, number = moment.partition(":")
    if where.startswith("_"):
        setattr(store, where, lambda *a, **k: crash())
        return
    holder, name = (Path, "rename") if where == "Path.rename" else (store.shutil, "rmtree")
    real = getattr(holder, name)

    def patched(*args, **options):
        calls["n"] += 1
        if calls["n"] == (3 if number == "last" else int(number)):
            crash()
        return real(*args, **options)

    setattr(holder, name, patched)


def whole(out: Path) -> str:
    """Which of the two results stands there, whole, for the next process."""
    for name, wanted in (("old", OLD), ("new", NEW)):
        try:
            if is_done(out, wanted):
                assert content(out) == {name}
                return name
        except UsageError:
            continue
    raise AssertionError("neither the old result nor the new one is there")


@pytest.mark.parametrize("moment", ["inside", *MOMENTS])
def test_an_exception_at_any_moment_leaves_one_whole_result(tmp_path, monkeypatch, moment):
    out = make(tmp_path / "out")

    def crash():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for holder, name in ((store, "_finish"), (store, "_settle"), (store, "_swap"), (Path, "rename")):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # put back after the test
    monkeypatch.setattr(store.shutil, "rmtree", store.shutil.rmtree)
    with (
        pytest.raises(EnvironmentFault, match="No space left") as raised,
        staged_folder(out, NEW, overwrite=True) as stage,
    ):
        (stage / "sub").mkdir()
        (stage / "a").write_text("new")
        (stage / "sub/b").write_text("new")
        if moment == "inside":
            crash()
        crash_at(moment, crash)
    monkeypatch.undo()
    assert raised.value.exit_code == 4 and "free some space" in str(raised.value)
    assert whole(out) in ("old", "new")
    make(out, NEW, "new", overwrite=True)
    assert whole(out) == "new" and left_over(tmp_path) == []


@pytest.mark.parametrize("moment", ["inside", *MOMENTS])
def test_a_kill_at_any_moment_leaves_one_whole_result(tmp_path, moment):
    out = make(tmp_path / "out")
    code = (
        "import os, signal, sys; from pathlib import Path; from tests import test_store as t\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with t.staged_folder(Path(sys.argv[1]), t.NEW, overwrite=True) as stage:\n"
        "    (stage / 'sub').mkdir(); (stage / 'a').write_text('new'); (stage / 'sub/b').write_text('new')\n"
        "    kill() if sys.argv[2] == 'inside' else t.crash_at(sys.argv[2], kill)\n"
    )
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code, str(out), moment], cwd=root, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert whole(out) in ("old", "new")
    make(out, NEW, "new", overwrite=True)
    assert whole(out) == "new" and left_over(tmp_path) == []


def test_a_result_moved_aside_comes_back_where_nobody_asks_to_overwrite(tmp_path):
    out = make(tmp_path / "out")
    out.rename(tmp_path / ".out.replaced")
    assert is_done(out, OLD) and content(out) == {"old"} and left_over(tmp_path) == []


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    with staged_file(path) as stage:
        stage.write_text("old")
    with pytest.raises(RuntimeError), staged_file(path, overwrite=True) as stage:
        stage.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and left_over(tmp_path) == []
    with pytest.raises(UsageError, match="exists"), staged_file(path):
        pass
    (tmp_path / ".scores.jsonl.staging").write_text("left by a killed process")
    with staged_file(path, overwrite=True) as stage:
        assert not stage.exists()
        stage.write_text("new")
    assert path.read_text() == "new" and left_over(tmp_path) == []


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(locks.STEPS))
def test_every_fault_of_the_system_says_what_to_do(tmp_path, number):
    with pytest.raises(EnvironmentFault) as raised, staged_file(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in str(raised.value) and raised.value.hint and str(tmp_path / "x") in str(raised.value)


def test_places_that_cannot_hold_a_result(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file/below/out", tmp_path / ("n" * 250)):
        with pytest.raises(EnvironmentFault, match="cannot write"):
            make(path)
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UsageError, match="a folder stands there"),
        staged_file(tmp_path / "folder", overwrite=True) as stage,
    ):
        stage.write_text("x")
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "folder").is_dir() and left_over(tmp_path) == []


def test_a_folder_one_may_not_write_to(public_path):
    with (
        unprivileged(public_path, 0o555),
        pytest.raises(EnvironmentFault, match="Permission denied") as raised,
    ):
        make(public_path / "out")
    assert "writable" in str(raised.value) and list(public_path.iterdir()) == []


def test_errors_of_the_caller_are_not_mistaken_for_the_systems(tmp_path):
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out", OLD):
        (tmp_path / "absent").read_text()
    assert left_over(tmp_path) == []


def test_a_second_writer_is_told_and_a_dead_one_holds_nothing(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out, OLD) as stage:
        (stage / "a").write_text("a")
        with pytest.raises(EnvironmentFault, match="another process is writing it"):
            make(out, NEW)
    assert is_done(out, OLD)
    (tmp_path / ".out2.lock").write_text("")  # the file of a killed process; nobody holds it
    make(tmp_path / "out2")
    assert left_over(tmp_path) == []


def test_whoever_comes_second_is_told_what_is_made_by_what_in_names_that_people_gave(tmp_path):
    out, place = tmp_path / "m", tmp_path / ".m.checkpoints"

    def refused() -> EnvironmentFault:
        with pytest.raises(EnvironmentFault) as raised, locks.locked(place, output=out, doing="a training"):
            pytest.fail("held twice")
        return raised.value

    with locks.locked(place, output=out, doing="plait merge auto"):
        for _ in range(2):  # who is refused leaves the holder's word there
            assert (refused().where, refused().what) == (str(out), "another process is making it: plait merge auto")
    with locks.locked(place, output=out):  # nothing is left of the last holder's
        assert refused().what == "another process is writing it"
    assert left_over(tmp_path) == []


def test_folders_made_for_an_output_are_on_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "flush_folder", flushed.append)
    with locks.locked(tmp_path / "a" / "b" / "out"):
        assert set(flushed) == {tmp_path, tmp_path / "a"}
        (tmp_path / "a" / "b" / "out").touch()
    with locks.locked(tmp_path / "a" / "b" / "out"):
        assert len(flushed) == 2


def test_folders_made_for_an_output_that_is_not_written_go_again(tmp_path):
    (tmp_path / "there").mkdir()
    with locks.locked(tmp_path / "there" / "a" / "b" / "out"), locks.locked(tmp_path / "there" / "a" / "c"):
        assert (tmp_path / "there" / "a" / "b").is_dir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
