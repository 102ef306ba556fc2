"""A fleet's members end where solo training brings them."""

from __future__ import annotations

import dataclasses
import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.disk.store import MANIFEST, identity
from plait.errors import Diverged, EnvironmentFault, UsageError
from plait.training import Member, TrainingSettings, fleet, fleet_run, rates_sweep, train_adapter, train_fleet
from tests.tiny import ARCHITECTURES, make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=20, lr=5e-3, batch_size=8, max_length=24)


def member(base, architecture, out, task=None, seed=0, rank=4, statistics=None, **changes):
    task = task or make_task()
    settings = dataclasses.replace(SETTINGS, **changes)
    return Member(
        make_adapter(base, task, architecture, rank, seed), task, make_examples(task, seed=seed), settings, seed, out,
        identity("train", {"settings": dataclasses.asdict(settings)}, seed=seed), statistics,
    )  # fmt: skip


def alone(m, base, out):
    return train_adapter(
        m.initial,
        m.task,
        m.examples,
        base,
        m.settings,
        seed=m.seed,
        out=out,
        identity=m.identity,
        statistics=m.statistics,
    )


def distance(a, b):
    """Largest relative difference of deltas and head tensors."""
    worst = 0.0
    for name, f in a.modules.items():
        x, y = f.delta(), b.modules[name].delta()
        worst = max(worst, float((x - y).norm() / y.norm().clamp(min=1e-12)))
        worst = max(worst, float((f.A - b.modules[name].A).norm() / b.modules[name].A.norm()))
    for name, tensor in a.heads.get(a.name, {}).items():
        other = b.heads[b.name][name]
        worst = max(worst, float((tensor - other).norm() / other.norm().clamp(min=1e-12)))
    return worst


def compare(members, base, tmp_path, tolerance=1e-4, **options):
    found = train_fleet(members, base, **options)
    for i, (m, trained) in enumerate(zip(members, found, strict=True)):
        assert distance(trained, alone(m, base, tmp_path / f"alone{i}")) < tolerance, i
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classification_and_regression_members(tiny_base, tmp_path, architecture):
    base = tiny_base(architecture)
    members = [
        member(base, architecture, tmp_path / "a"),
        member(base, architecture, tmp_path / "b", make_task("three", classes=3), seed=1, lr=2e-3, rank=2),
        member(base, architecture, tmp_path / "c", make_task("value", "regression"), seed=2, head_lr=1e-3),
        member(base, architecture, tmp_path / "d", seed=3, weight_decay=0.1, max_grad_norm=0.05, warmup_ratio=0.2),
    ]
    found = compare(members, base, tmp_path)
    assert [a.name for a in found] == ["topic", "three", "value", "topic"]
    assert not torch.equal(
        found[0].modules[next(iter(found[0].modules))].B, found[3].modules[next(iter(found[3].modules))].B
    )


@pytest.mark.parametrize(("kind", "architecture"), [("causal", "llama"), ("causal", "gpt2"), ("seq2seq", "t5")])
def test_text_members(tiny_base, tmp_path, kind, architecture):
    base = tiny_base(architecture)
    members = [member(base, architecture, tmp_path / str(s), make_task(f"t{s}", kind), seed=s) for s in range(3)]
    found = compare(members, base, tmp_path)
    # What is on disk names modules as in the whole model; training goes on from it all the same.
    on = [dataclasses.replace(m, initial=a, out=tmp_path / f"on{m.seed}") for m, a in zip(members, found, strict=True)]
    again = train_fleet(on, base)
    assert distance(again[0], train_adapter(
        found[0], on[0].task, on[0].examples, base, on[0].settings, seed=0, out=tmp_path / "on-alone", identity=on[0].identity,
    )) < 1e-4  # fmt: skip


def same_bits(a, b):
    return all(
        torch.equal(f.A, b.modules[n].A) and torch.equal(f.B, b.modules[n].B) for n, f in a.modules.items()
    ) and all(torch.equal(t, b.heads[b.name][k]) for k, t in a.heads[a.name].items())


def test_a_member_does_not_depend_on_its_company(tiny_base, tmp_path):
    base = tiny_base("bert")
    pair = train_fleet([member(base, "bert", tmp_path / "p" / str(s), seed=s) for s in range(2)], base)
    many = train_fleet([member(base, "bert", tmp_path / "m" / str(s), seed=s) for s in (3, 1, 5, 0, 2)], base)
    assert distance(pair[0], many[3]) < 1e-5 and distance(pair[1], many[1]) < 1e-5


def test_what_a_step_is_cut_into_changes_nothing(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    found = []
    for floor, cap in ((1, 1 << 40), (10**9, 1 << 40), (1, 30)):
        monkeypatch.setattr(fleet_run, "pass_floor", lambda *_, floor=floor: floor)
        monkeypatch.setattr(fleet_run, "_token_cap", lambda *_, cap=cap: cap)
        members = [member(base, "bert", tmp_path / f"{floor}-{cap}-{s}", seed=s) for s in range(3)]
        found.append(train_fleet(members, base))
    for other in found[1:]:
        assert all(distance(a, b) < 1e-4 for a, b in zip(found[0], other, strict=True))


def test_finished_members_are_read_and_the_rest_trained(tiny_base, tmp_path):
    base = tiny_base("bert")
    members = [member(base, "bert", tmp_path / str(s), seed=s) for s in range(3)]
    first = train_fleet(members[:2], base)
    steps = []
    again = train_fleet(members, base, progress=lambda *s: steps.append(s))
    assert all(same_bits(a, b) for a, b in zip(first, again[:2], strict=True))
    assert steps[-1][:2] == (20, 20)
    with pytest.raises(UsageError, match=r"two members write the same folder \(give each a folder"):
        train_fleet([members[0], members[0]], base)


class Stop(Exception):
    pass


def test_a_fleet_killed_between_two_writes_is_finished_as_it_was(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    straight = train_fleet(
        [member(base, "bert", tmp_path / "s" / str(s), seed=s, checkpoint_every=50) for s in range(3)], base
    )
    members = [member(base, "bert", tmp_path / "b" / str(s), seed=s, checkpoint_every=50) for s in range(3)]
    real, written = fleet._write, []

    def breaking(m, *rest):
        if len(written) == 1:
            raise Stop
        written.append(m)
        real(m, *rest)

    monkeypatch.setattr(fleet, "_write", breaking)
    with pytest.raises(Stop):
        train_fleet(members, base)
    monkeypatch.setattr(fleet, "_write", real)
    steps = []
    resumed = train_fleet(members, base, progress=lambda *s: steps.append(s))
    assert len(steps) == 1, "trained again"
    assert all(same_bits(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not list((tmp_path / "b").glob(".*checkpoints"))


def test_the_step_by_which_memory_is_judged_takes_a_row_of_its_member(tiny_base, tmp_path):
    base = tiny_base("bert")
    tasks = [make_task("two"), make_task("graded", "regression"), make_task("five", classes=5)]
    shared = fleet_run.Shared([member(base, "bert", tmp_path / t.name, t) for t in tasks], base)
    for row in range(len(shared.bank.lengths)):  # a head of two classes cannot take a label of five
        step, _, _ = fleet_run._single_step(shared, row)
        assert torch.isfinite(step()).all()


def test_an_interrupted_fleet_goes_on_to_the_same_bits(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    options = {"checkpoint_every": 4, "snapshots": (3, 20)}
    straight = train_fleet([member(base, "bert", tmp_path / "s" / str(s), seed=s, **options) for s in range(3)], base)
    members = [member(base, "bert", tmp_path / "b" / str(s), seed=s, **options) for s in range(3)]
    real, done = fleet_run.BatchedAdapters.step, []

    def breaking(self, index, *rest):
        done.append(index)
        if index == 10:
            raise Stop
        return real(self, index, *rest)

    monkeypatch.setattr(fleet_run.BatchedAdapters, "step", breaking)
    with pytest.raises(Stop):
        train_fleet(members, base)
    done.clear()
    monkeypatch.setattr(
        fleet_run.BatchedAdapters, "step", lambda self, index, *rest: done.append(index) or real(self, index, *rest)
    )
    resumed = train_fleet(members, base)
    assert done == list(range(8, 20))
    assert all(same_bits(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not list((tmp_path / "b").glob(".*checkpoints"))
    for s in range(3):
        early = [read_adapter(tmp_path / which / str(s) / "steps" / "000003", name="topic") for which in "sb"]
        assert same_bits(*early)
        assert same_bits(read_adapter(tmp_path / "b" / str(s) / "steps" / "000020", name="topic"), resumed[s])


def test_memory_that_runs_out_splits_the_fleet_and_loses_nobody(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    expected = train_fleet([member(base, "bert", tmp_path / "a" / str(s), seed=s) for s in range(5)], base)
    real, sizes, failed = fleet_run.BatchedAdapters._sums, [], []

    def small(self, part, bank, rows):
        # What did not fit is let go of before less is tried: an error at hand holds its frames, and they the tensors.
        assert all(other() in (None, self) for other in failed)
        sizes.append(len(self.prepared) * (part.last - part.first) * part.length)
        if sizes[-1] > 60:
            failed.append(weakref.ref(self))
            raise torch.OutOfMemoryError("no")
        return real(self, part, bank, rows)

    monkeypatch.setattr(fleet_run.BatchedAdapters, "_sums", small)
    steps = []
    members = [member(base, "bert", tmp_path / "b" / str(s), seed=s) for s in range(5)]
    found = train_fleet(members, base, limit=5, progress=lambda *s: steps.append(s))
    assert max(sizes) > 60
    assert all(distance(a, b) < 1e-4 for a, b in zip(expected, found, strict=True))
    assert steps[-1][:2] == (100, 100)


def test_a_row_that_does_not_fit_is_said(tiny_base, tmp_path, monkeypatch):
    def never(self, part, bank, rows):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(fleet_run.BatchedAdapters, "_sums", never)
    base = tiny_base("bert")
    with pytest.raises(EnvironmentFault, match="one row of one adapter") as raised:
        train_fleet([member(base, "bert", tmp_path / str(s), seed=s) for s in range(2)], base)
    assert "max_length" in raised.value.hint and not list(tmp_path.iterdir())


def test_a_member_that_leaves_the_numbers_takes_nobody_along(tiny_base, tmp_path):
    base = tiny_base("bert")
    good = [member(base, "bert", tmp_path / str(s), seed=s) for s in range(2)]
    bad = member(base, "bert", tmp_path / "bad", seed=7, lr=1e38, checkpoint_every=5)
    by_itself = member(base, "bert", tmp_path / "bad2", seed=7, lr=1e30, dropout=0.1)
    with pytest.raises(Diverged, match=r"2 of 4.*bad") as lost:
        train_fleet([by_itself, good[0], bad, good[1]], base)
    assert {Path(out).name for out in lost.value.lost} == {"bad", "bad2"}
    assert re.fullmatch(r"the loss became (nan|inf) at step \d+ of 20", lost.value.lost[str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()
    assert distance(read_adapter(tmp_path / "0"), alone(good[0], base, tmp_path / "alone")) < 1e-4


def test_members_that_cannot_be_stacked_are_trained_alone(tiny_base, tmp_path):
    base = tiny_base("bert")
    with_dropout = member(base, "bert", tmp_path / "d", dropout=0.2)
    found = train_fleet([with_dropout, member(base, "bert", tmp_path / "f")], base)
    assert same_bits(found[0], alone(with_dropout, base, tmp_path / "alone"))
    assert "fleet" not in json.loads((tmp_path / "d" / MANIFEST).read_text())["result"]
    assert json.loads((tmp_path / "f" / MANIFEST).read_text())["result"]["fleet"] == 1


def test_a_sweep_of_rates(tiny_base, tmp_path):
    base = tiny_base("bert")
    members = rates_sweep(member(base, "bert", tmp_path / "a"), {"low": 1e-4, "high": 1e-2})
    low, high = train_fleet(members, base)
    assert [m.out.name for m in members] == ["a-low", "a-high"]
    name = next(iter(low.modules))
    assert low.modules[name].B.norm() < 0.1 * high.modules[name].B.norm()


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"dtype": "bfloat16"}])
def test_half_precision_members_stay_near_solo_and_near_float32(tiny_base, tmp_path, options):
    dtype = {"dtype": options["dtype"]} if "dtype" in options else {}
    precision = {"precision": options["precision"]} if "precision" in options else {}
    base, exact = tiny_base("bert", **dtype), tiny_base("bert")
    members = [member(base, "bert", tmp_path / str(s), seed=s, **precision) for s in range(2)]
    for m, found in zip(members, train_fleet(members, base), strict=True):
        assert all(f.A.dtype == torch.float32 for f in found.modules.values())
        solo = alone(m, base, tmp_path / f"alone{m.seed}")
        full = alone(member(exact, "bert", tmp_path / "x", seed=m.seed), exact, tmp_path / f"full{m.seed}")
        assert distance(found, full) < 0.5 and distance(solo, full) < 0.5
    with pytest.raises(UsageError, match="float16"):
        train_fleet([member(base, "bert", tmp_path / "half")], dataclasses.replace(base, dtype="float16"))


def test_tied_members_train_one_adapter_and_are_refused_alone_or_where_they_differ(tiny_base, tmp_path):
    base = tiny_base("bert")
    tasks = [make_task("topic"), make_task("grade", "regression")]
    members = [member(base, "bert", tmp_path / t.name, task=t, tied="both", steps=3) for t in tasks]
    one, other = train_fleet(members, base)
    assert all(
        torch.equal(f.A, other.modules[m].A) and torch.equal(f.B, other.modules[m].B) for m, f in one.modules.items()
    )
    apart = train_fleet([member(base, "bert", tmp_path / "apart", task=tasks[0], steps=3)], base)[0]
    assert any(not torch.equal(f.B, apart.modules[m].B) for m, f in one.modules.items())
    with pytest.raises(UsageError, match="as a fleet"):
        alone(dataclasses.replace(members[0], out=tmp_path / "x"), base, tmp_path / "x")
    changed = dataclasses.replace(members[1], settings=dataclasses.replace(members[1].settings, lr=1.0))
    with pytest.raises(UsageError, match="differ in their settings"):
        train_fleet([dataclasses.replace(members[0], out=tmp_path / "y"), changed], base, overwrite=True)


def test_snapshots_after_the_end_are_refused_alone_and_together(tiny_base, tmp_path):
    base = tiny_base("bert")
    late = member(base, "bert", tmp_path / "a", snapshots=(20, 21))
    for train in (lambda: train_fleet([late], base), lambda: alone(late, base, tmp_path / "b")):
        with pytest.raises(UsageError, match="snapshot after step 21, and the training has 20"):
            train()
    assert not list(tmp_path.iterdir())
