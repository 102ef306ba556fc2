"""A rate of the sweep whose loss leaves the numbers is an answer: noted, shown, never chosen. A reported one is an error."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from plait.disk.store import read_manifest
from plait.errors import Diverged, RunError
from plait.report import write_report
from plait.runs.executors import InProcess
from plait.runs.layout import Layout
from plait.runs.reporting import Lines, Report
from plait.runs.run import run
from plait.runs.sources import adapters_of
from plait.runs.stages import do
from plait.runs.trainings import train
from plait.runs.waves import chosen, chosen_alone, next_wave, sweep_units, swept

FAR = 1e30  # a rate at which nothing stays a number


def done(study, out):
    """A study done, its layout and what was said."""
    layout, said = Layout(study, out), []
    executor = InProcess(layout)
    do_batches = executor.run
    executor.run = lambda batches, report: do_batches(batches, Lines(said.append))
    assert run(study, out, executor=executor, layout=layout, quiet=True).finished
    return layout, said


def few(rates, arms):
    return {"arms": arms, "repair": None, "variants": [], "rates": rates, "seeds": [0]}


def test_a_rate_that_diverges_is_noted_shown_and_never_chosen(small_study, tmp_path):
    joint = {"name": "joint", "subspace": "kaiming", "joint": True}
    study = small_study(**few([FAR, 0.03], ["kaiming", "orthonormal", joint]), moments=[2])
    layout, said = done(study, tmp_path / "out")
    assert sum(s.startswith("diverged: ") and "lr 1e+30" in s for s in said) == 6  # 3 arms, 2 tasks
    for arm in study.arm_specs:
        assert chosen(layout, arm).rate == chosen_alone(layout, arm).rate == 0.03
        lost = [r for r in swept(layout, arm) if r["lr"] == FAR]
        assert lost and all("the loss became" in r["diverged"] and r["alone"] is None for r in lost)
        assert all("diverged" not in r for r in swept(layout, arm) if r["lr"] != FAR)
    write_report(layout, tmp_path, name="tiny", about={})
    page, found = (tmp_path / "tiny.md").read_text(), json.loads((tmp_path / "tiny.json").read_text())
    assert "| `kaiming` | 1e+30 | end | diverged | – | – | – |" in page and "never chosen" in page
    assert {r["lr"] for r in found["rows"]} == {0.03} and "nan" not in page
    shutil.rmtree(layout.out / "train")  # the scores say it by themselves
    assert next_wave(Layout(study, layout.out)) == ("", [])


def test_where_every_rate_diverges_the_arm_is_named(small_study, tmp_path):
    study = small_study(**few([0.03], ["kaiming", {"name": "orthonormal", "rates": [FAR]}]))
    layout = Layout(study, tmp_path)
    for _ in range(2):  # nothing is trained in vain at the second call
        with pytest.raises(RunError, match="arm orthonormal: every rate of the sweep diverged"):
            run(study, tmp_path, layout=layout, quiet=True)


def test_one_task_is_enough_and_what_was_noted_is_not_tried_again(small_study, tmp_path, monkeypatch):
    study = small_study(**few([0.03], ["kaiming"]))
    layout = Layout(study, tmp_path)
    (unit,) = sweep_units(layout)
    do(next_wave(layout)[1], layout)  # statistics
    asked = []

    def fleet(members, base, **_):
        asked.append([m.task.name for m in members])
        if len(members) > 1:
            raise Diverged("lost", lost={str(members[0].out): "the loss became nan at step 2 of 4"})

    monkeypatch.setattr("plait.runs.trainings.train_fleet", fleet)
    train([unit], layout, Report())
    assert read_manifest(layout.path(unit) / "topic")["result"] == {"diverged": "the loss became nan at step 2 of 4"}
    assert not layout.done(unit)  # the other task's adapter is not there: the run was ended before it was written
    train([unit], layout, Report())
    assert asked == [["topic", "grade"], ["grade"]]


def test_a_reported_training_that_diverges_is_an_error(small_study, tmp_path):
    layout = Layout(small_study(**few([FAR], ["kaiming"])), tmp_path)
    (unit,) = sweep_units(layout)
    reported = replace(unit, seed=0)
    do([layout.statistics_unit(u) for u in (unit, reported)], layout)
    for count in (4, 2):  # that of the sweep is not tried again
        with pytest.raises(Diverged, match=f"{count} of {count} adapters"):
            train([unit, reported], layout, Report())
        assert layout.done(unit) and not layout.done(reported)
    with pytest.raises(Diverged, match=r"kaiming.*the loss became"):
        adapters_of(unit, layout)
    assert not (layout.path(reported) / "topic").exists()
