"""A choice that was begun with other settings: what still holds is gone on with, and what does not is lost only where that is asked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.choosing import auto, finishing
from plait.choosing.auto_settings import AutoSettings
from plait.cli.output import guarded
from plait.errors import EnvironmentFault, RunError, UsageError
from plait.learning import fitting
from plait.learning.checkpoint_files import read_state
from plait.learning.checkpoint_reach import FINISHING, FIT, MERGE, SCORES
from plait.learning.checkpoints import Checkpoints
from plait.training.checkpoints import latest_whole, seal
from tests.choosing.ended import Begun, Killed, contents, killed_after
from tests.panels import folders_of

WHOLE = AutoSettings(methods=("tsv",), scales=(0.4,), refine=2, repair=2, max_length=24)
AT_CHOICE, AT_END = "at the choice", "at the end"
FORGOTTEN = {  # name, what is asked for then, when the first run ended -> the pieces that hold all the same
    "refine": ({"refine": 1}, AT_END, {SCORES, FIT}),
    "rank": ({"rank": 2}, AT_CHOICE, {SCORES}),
    "repair": ({"repair": 1}, AT_END, {SCORES, FIT, MERGE}),
    "heads": ({"heads": False}, AT_END, {SCORES, FIT, MERGE}),
    "learn_heads": ({"learn_heads": True}, AT_CHOICE, {SCORES, FIT, MERGE}),
    "dtype": ({"dtype": "bfloat16"}, AT_END, {SCORES, FIT, MERGE, FINISHING}),
}


@pytest.fixture
def ended(make_panel, tmp_path, monkeypatch, untimed):
    """A run of everything that was ended after its last step, and copies of its checkpoints there and at the choice."""
    panel = make_panel(texts=12)
    monkeypatch.setattr(fitting, "TRIED", fitting.TRIED[:1])
    run = Begun(panel, folders_of(panel, tmp_path), tmp_path, WHOLE)
    monkeypatch.setattr(finishing, "with_learnt_heads", partial(finishing.with_learnt_heads, steps=2))
    write = Checkpoints._write

    def copying(self, root):
        write(self, root)
        after = self._pieces[FINISHING].values["after"] if FINISHING in self._pieces else ()
        if set(self._pieces) == {SCORES, FIT, MERGE} or len(after) == 2:
            shutil.copytree(root, tmp_path / (AT_END if after else AT_CHOICE))
        if len(after) == 2:
            raise Killed

    with monkeypatch.context() as once:
        once.setattr(Checkpoints, "_write", copying)
        with pytest.raises(Killed):
            run()
    return run


def test_what_an_option_does_not_reach_is_gone_on_with_and_the_result_is_that_of_a_run_from_the_beginning(
    ended, tmp_path
):
    for name, (asked, at, holds) in FORGOTTEN.items():
        shutil.rmtree(ended.root, ignore_errors=True)
        shutil.copytree(tmp_path / at, ended.root)
        there = set(read_state(latest_whole(ended.root)).pieces)
        if there <= holds:
            said = ended(**asked)  # nothing is lost, so nothing is asked
        else:
            before = contents(ended.root)
            with pytest.raises(UsageError, match="begun there with other settings"):
                ended(**asked)
            assert contents(ended.root) == before, name
            said = ended(**asked, overwrite=True)
        assert "begun otherwise" in said[1], name
        assert said[1].startswith("going on from") == bool(there & holds), name
        ended("straight/out", **asked, overwrite=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out"), name
        assert not ended.root.exists()
        shutil.rmtree(tmp_path / "out")


def test_what_would_be_lost_is_told_by_name_and_stays(begun, tmp_path):
    before = contents(begun.root)
    with pytest.raises(UsageError) as raised:
        begun(refine=3)
    said = str(raised.value)
    assert raised.value.where == str(tmp_path / "out")
    assert "scores of merges and learnt weights are there" in said and "--refine 2 -> 3" in said
    assert "learnt weights would be lost" in said and "--overwrite goes on from what still holds" in said
    with pytest.raises(UsageError) as raised:
        begun(max_length=16, seed=1, texts={**begun.panel.texts, "two": begun.panel.texts["two"][:-1]})
    said = str(raised.value)
    assert "other texts of two; --max-length 24 -> 16; --seed 0 -> 1" in said and "all of it would be lost" in said
    other = read_adapter(begun.folders[0])
    write_adapter(tmp_path / "one", replace(other, modules=dict(list(other.modules.items())[1:])))
    with pytest.raises(UsageError, match="adapter one is another"):
        begun()
    assert contents(begun.root) == before


def test_a_mistake_in_the_command_loses_nothing_even_with_overwrite(begun):
    before = contents(begun.root)
    with pytest.raises(UsageError, match="no texts for two"):
        begun(texts={"one": begun.panel.texts["one"]}, overwrite=True)
    assert contents(begun.root) == before
    assert begun()[1].startswith("going on from")


def test_what_was_lost_on_purpose_is_not_gone_on_with_by_the_next_run(begun, monkeypatch):
    """Also where that run is ended before it has written more than once."""
    for settings in ({"refine": 3}, {"refine": 2}):
        with monkeypatch.context() as once:
            killed_after(once, 1)
            with pytest.raises(Killed):
                begun(**settings, overwrite=True)
        assert begun.root.exists()
    assert begun()[1].startswith("going on from")


def test_a_folder_that_does_not_say_what_it_is_of_is_asked_about(begun):
    (begun.root / "identity.json").write_text("{")
    for checkpoint in begun.root.glob("checkpoint-*"):
        state = checkpoint / "state.json"
        state.write_text(state.read_text().replace('"identity"', '"other"'))
        seal(checkpoint.rename(begun.root / "staging"), checkpoint)
    with pytest.raises(UsageError, match="it does not say what it was made from"):
        begun()
    assert begun(overwrite=True)[1].endswith("begun anew")


# --- what is said at the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "first"),
    [
        (KeyboardInterrupt, "interrupted; run the same command again to go on"),
        (EnvironmentFault("no memory"), "error: no memory"),
        (ValueError("a bug"), "error: ValueError: a bug (unexpected; --debug shows the traceback)"),
    ],
)
def test_the_last_line_says_where_what_is_done_is_kept(begun, monkeypatch, capsys, raised, first):
    monkeypatch.setattr(auto, "finished", lambda *_, **__: (_ for _ in ()).throw(raised))
    assert guarded(lambda: begun() and 0, debug=False, as_json=False) != 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == first
    kept = f"what is done so far is kept in {begun.root} ("
    assert lines[-1].startswith(kept) and lines[-1].endswith("kB): the same command goes on from there")


def test_where_nothing_is_kept_nothing_is_said_of_it(begun, monkeypatch, capsys):
    monkeypatch.setattr(auto, "finished", lambda *_, **__: (_ for _ in ()).throw(RunError("refused")))
    assert guarded(lambda: begun() and 0, debug=False, as_json=False) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: refused" and not begun.root.exists()
