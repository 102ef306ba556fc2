"""What interrupted fleets keep is lost by nobody else, and not without being asked."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading

import pytest
import torch

from plait.errors import EnvironmentFault, UsageError
from plait.training import fleet, fleet_run, train_fleet
from tests.training.test_fleet import Stop, member, same_bits


def begin(monkeypatch, members, base, at=10):
    """Train a fleet that is ended at a step; returns what it said."""
    real = fleet_run.BatchedAdapters.step

    def breaking(self, index, *rest):
        if index == at:
            raise Stop
        return real(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fleet_run.BatchedAdapters, "step", breaking)
        with pytest.raises(Stop) as ended:
            train_fleet(members, base)
    return getattr(ended.value, "__notes__", [])


def kept_in(folder):
    return sorted(p.name for p in folder.glob(".fleet-*.checkpoints"))


@pytest.fixture
def begun(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    members = [member(base, "bert", tmp_path / "b" / str(s), seed=s, checkpoint_every=4) for s in range(3)]
    notes = begin(monkeypatch, members, base)
    assert len(notes) == 1 and "kept in" in notes[0] and kept_in(tmp_path / "b")[0] in notes[0]
    return base, members, tmp_path / "b"


def test_another_fleet_in_the_same_folder_leaves_it(begun, tmp_path):
    base, members, folder = begun
    before = kept_in(folder)
    train_fleet([member(base, "bert", folder / "other", seed=9, checkpoint_every=4)], base)
    assert kept_in(folder) == before
    straight = [dataclasses.replace(m, out=tmp_path / "s" / m.out.name) for m in members]
    assert all(map(same_bits, train_fleet(members, base), train_fleet(straight, base)))
    assert not kept_in(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda base, folder: [member(base, "bert", folder / str(s), seed=s, checkpoint_every=4, lr=1e-3) for s in range(3)],
         r"other settings and kept at step 8: .*lr: 0.005 -> 0.001"),
        (lambda base, folder: [member(base, "bert", folder / str(s), seed=s, checkpoint_every=4) for s in range(2)],
         r"together with others and kept at step 8: 2"),
    ],
    ids=["another rate", "fewer"],
)  # fmt: skip
def test_nothing_is_lost_without_being_asked(begun, changed, said):
    base, _, folder = begun
    before, members = kept_in(folder), changed(base, folder)
    with pytest.raises(UsageError, match=said):
        train_fleet(members, base)
    assert kept_in(folder) == before
    assert len(train_fleet(members, base, overwrite=True)) == len(members)
    assert not kept_in(folder)


def test_more_members_go_on_beside_those_that_were_begun(begun, monkeypatch):
    base, members, folder = begun
    real, steps = fleet_run.BatchedAdapters.step, []
    monkeypatch.setattr(
        fleet_run.BatchedAdapters, "step", lambda self, index, *rest: steps.append(index) or real(self, index, *rest)
    )
    train_fleet([*members, member(base, "bert", folder / "more", seed=5, checkpoint_every=4)], base)
    assert steps == [*range(8, 20), *range(20)] and not kept_in(folder)


def test_what_was_ended_before_its_first_checkpoint_holds_nobody_up(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    members = [member(base, "bert", tmp_path / str(s), seed=s, checkpoint_every=4) for s in range(2)]
    assert begin(monkeypatch, members, base, at=2) == []
    train_fleet([member(base, "bert", tmp_path / "0", checkpoint_every=4, lr=1e-3)], base)
    assert not kept_in(tmp_path)


def test_what_is_left_of_a_fleet_whose_members_are_all_written_goes(begun, monkeypatch):
    """Ended between the last member and the removal; a fourth is asked for beside them."""
    base, members, folder = begun
    with monkeypatch.context() as patch:
        patch.setattr(fleet.Outcome, "forget", lambda self: None)
        train_fleet(members, base)
    assert kept_in(folder)
    train_fleet([*members, member(base, "bert", folder / "more", seed=5)], base)
    assert not kept_in(folder)


def test_a_fleet_that_memory_splits_leaves_nothing(tiny_base, tmp_path, monkeypatch):
    """Memory runs out behind the first checkpoint of all; halves begin again."""
    base = tiny_base("bert")
    members = [member(base, "bert", tmp_path / str(s), seed=s, checkpoint_every=4) for s in range(4)]
    real = fleet_run.BatchedAdapters.step

    def small(self, index, *rest):
        if index == 6 and len(self.prepared) > 2:
            raise torch.OutOfMemoryError("no")
        return real(self, index, *rest)

    monkeypatch.setattr(fleet_run.BatchedAdapters, "step", small)
    assert len(train_fleet(members, base, limit=4)) == 4
    assert not kept_in(tmp_path)


def hold(folder, out, ready, go):
    """Train a fleet that waits at a step, in a process of its own."""
    from plait.model.base import BaseModel

    base = BaseModel(folder, device="cpu")
    real = fleet_run.BatchedAdapters.step

    def waiting(self, index, *rest):
        if index == 10:
            ready.set()
            go.wait(120)
        return real(self, index, *rest)

    fleet_run.BatchedAdapters.step = waiting
    train_fleet([member(base, "bert", out / str(s), seed=s, checkpoint_every=4) for s in range(2)], base)


def test_two_processes_do_not_train_one_member(tiny_base, tmp_path):
    base, context = tiny_base("bert"), multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(base.name, tmp_path, ready, go))
    process.start()
    assert ready.wait(120)
    before = kept_in(tmp_path)
    with pytest.raises(EnvironmentFault, match="another process is making it: a training"):
        train_fleet([member(base, "bert", tmp_path / "1", seed=1, checkpoint_every=4)], base)
    train_fleet([member(base, "bert", tmp_path / "other", seed=7, checkpoint_every=4)], base)
    assert kept_in(tmp_path) == before
    go.set()
    process.join(120)
    assert process.exitcode == 0 and not kept_in(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"0", "1", "other"}


def ended_while_it_writes(monkeypatch, members, base, fails):
    """Train a fleet of which some members cannot be written."""
    real, written = fleet._write, threading.Event()

    def breaking(one, *rest):
        if fails(one.out):
            assert written.wait(60)
            raise Stop
        real(one, *rest)
        written.set()

    with monkeypatch.context() as patch:
        patch.setattr(fleet, "_write", breaking)
        with pytest.raises(Stop):
            train_fleet(members, base)


def test_a_fleet_in_several_folders_that_was_ended_while_it_wrote_is_not_trained_again(
    tiny_base, tmp_path, monkeypatch
):
    base = tiny_base("bert")
    members = [member(base, "bert", tmp_path / str(s) / "a", seed=s, checkpoint_every=4) for s in range(3)]
    ended_while_it_writes(monkeypatch, members, base, lambda out: not kept_in(out.parent))
    written = [m.out for m in members if m.out.is_dir()]
    assert len(written) == 1 and kept_in(written[0].parent)  # the checkpoints lie beside the one that is written
    with monkeypatch.context() as patch:
        patch.setattr(fleet_run.BatchedAdapters, "step", lambda *_: pytest.fail("trained again"))
        train_fleet(members, base)
    assert all(m.out.is_dir() and not kept_in(m.out.parent) for m in members)


def test_what_a_fleet_did_not_write_is_lost_to_no_other_and_not_in_silence(tiny_base, tmp_path, monkeypatch, capsys):
    base, folder = tiny_base("bert"), tmp_path / "f"
    members = [member(base, "bert", folder / str(s), seed=s, checkpoint_every=4) for s in range(3)]
    ended_while_it_writes(monkeypatch, members, base, lambda out: out.name != "0")
    assert [m.out.is_dir() for m in members] == [True, False, False]
    with pytest.raises(UsageError, match=r"together with others and kept at step .*: .*2"):
        train_fleet([members[1]], base)
    train_fleet(members[1:], base)
    assert "trained again" in capsys.readouterr().err and all(m.out.is_dir() for m in members)
