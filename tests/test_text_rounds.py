"""Rounds where every answer is written: a part of a schedule beside a loop of its own, a base that wears a merge, the script small."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from plait.errors import UsageError
from plait.runs.layout import Layout
from plait.runs.recipe_file import read_recipe
from plait.runs.sources import adapters_of
from plait.runs.stages import do
from plait.runs.trainings import members_of
from plait.runs.units import TRAIN, Unit
from tests import written_study

ROOT = Path(__file__).parents[1]
PENALISED = {
    "name": "contrastive_penalised", "subspace": "contrastive",
    "training": {"constraint": "penalised", "constraint_options": {"beta": 1.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("text_rounds")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    """The study's layout, its trained adapters of both arms, and what they were trained from."""
    folder = tmp_path_factory.mktemp("study")
    study = written_study.make(folder, ["kaiming", PENALISED])
    layout = Layout(read_recipe(study, []), folder / "run")
    units = {a: Unit(TRAIN, 1, a, 0.01) for a in ("kaiming", PENALISED["name"])}
    do([layout.statistics_unit(units["kaiming"])], layout)
    do(list(units.values()), layout)
    return SimpleNamespace(
        folder=folder, study=study, layout=layout, base=layout.session.base,
        members={a: members_of(u, layout) for a, u in units.items()},
        trained={a: adapters_of(u, layout) for a, u in units.items()},
    )  # fmt: skip


def same(one, other, **tolerance) -> bool:
    """Whether two updates are alike, whatever their modules are called."""
    pairs = zip(one.modules.values(), other.modules.values(), strict=True)
    return all(torch.allclose(f.delta(), g.delta(), **tolerance) for f, g in pairs)


@pytest.mark.parametrize("arm", ["kaiming", "contrastive_penalised"])
def test_one_part_is_the_studys_own_training(script, small, arm):
    made = script.part_trained(small.members[arm], small.base)
    assert list(made) == ["one", "two"]
    assert all(same(made[t], small.trained[arm][t], atol=1e-7) for t in made)


@pytest.mark.parametrize("arm", ["kaiming", "contrastive_penalised"])
def test_a_later_part_on_a_worn_base_is_what_a_plain_loop_makes_of_it(script, small, arm):
    """PEFT's layers, torch's AdamW and a hook in float32 stand beside the fleet: the schedule and the rows go on, the moments do not."""
    plain = importlib.import_module("full_finetuning")
    worn = script.added(None, script.part_trained(small.members["kaiming"], small.base)["two"], 0.4)
    members = [replace(m, initial=small.trained[arm][m.task.name]) for m in small.members[arm]]
    made = script.part_trained(members, small.base, (1, 2), worn)
    unworn = script.part_trained(members, small.base, (1, 2))
    for m in members:
        looped = plain.trained(
            small.layout.session, m.task.name, m.initial, m.settings, m.statistics or {}, 1, False, part=(1, 2), carried=worn
        )  # fmt: skip
        assert same(made[m.task.name], looped, atol=2e-5)
        assert not same(unworn[m.task.name], looped, atol=2e-4)  # ten times as far
        assert not same(m.initial, looped, atol=2e-4)


def test_rounds_train_on_the_sum_of_their_merges_and_end_in_it(script, small, monkeypatch):
    worn, merges, starts, trained, rule = [], [], [], script.part_trained, script.by_rule

    def part_trained(members, base, part, carried):
        worn.append((part, carried))
        starts.append([m.initial for m in members])
        return trained(members, base, part, carried)

    def by_rule(adapters, device):
        merges.append((rule(adapters, device), dict(adapters)))
        return merges[-1][0]

    monkeypatch.setattr(script, "part_trained", part_trained)
    monkeypatch.setattr(script, "by_rule", by_rule)
    run = SimpleNamespace(layout=small.layout, device="cpu")
    ended = script.run_arm(run, script.Way("kaiming", 3, merges=True), 1, {})
    assert [p for p, _ in worn] == [(0, 3), (1, 3), (2, 3)]
    assert all(
        one is first for part in starts for one, first in zip(part, starts[0], strict=True)
    )  # fresh factors each time
    (whole, scale), *_ = ended.merges.values()
    assert scale == 1.0 and list(ended.scales.values()) == [merges[0][0][1]]
    for name, f in whole.modules.items():
        parts = [s * made.modules[name].delta() for (made, s), _ in merges]
        before = worn[2][1].modules[name].delta()
        assert worn[0][1] is None and torch.allclose(worn[1][1].modules[name].delta(), parts[0], atol=1e-6)
        assert torch.allclose(before, parts[0] + parts[1], atol=1e-6) and torch.allclose(
            f.delta(), sum(parts), atol=1e-6
        )
        for task, own in ended.own.items():  # what its last part was trained as
            last = merges[2][1][task].modules[name].delta()
            assert torch.allclose(own.modules[name].delta(), before + last, atol=1e-6) and last.norm() > 0


def test_moments_taken_halfway_are_what_the_second_half_is_penalised_by(script, small, monkeypatch):
    seen, trained = [], script.part_trained

    def part_trained(members, *rest):
        seen.append((members[0].statistics, [m.initial for m in members]))
        assert all(m.statistics is seen[-1][0] for m in members)
        return trained(members, *rest)

    monkeypatch.setattr(script, "part_trained", part_trained)
    run, begun = SimpleNamespace(layout=small.layout, device="cpu"), {}
    restarted = script.run_arm(run, script.ARMS["restarted"], 1, begun)
    refreshed = script.run_arm(run, script.ARMS["refreshed"], 1, begun)
    (first, _), (kept, halfway), (fresh, gone_on) = seen  # one first half serves both
    assert kept is first and fresh is not first and all(a is b for a, b in zip(halfway, gone_on, strict=True))
    off = [
        float((m.second - fresh["two"].sites[s].second).norm() / m.second.norm()) for s, m in first["two"].sites.items()
    ]
    assert max(off) > 1e-3 and min(off) < 1e-5  # what comes before the first adapted module stays
    assert not same(restarted.own["one"], refreshed.own["one"], atol=1e-6)
    assert set(refreshed.merges) == {"task_arithmetic, by rule", "task_arithmetic"}


def test_fewer_steps_than_parts_are_refused(script, small):
    with pytest.raises(UsageError, match="4 steps in 5 parts"):
        script.part_trained(small.members["kaiming"], small.base, (0, 5))


def test_the_script_runs_small_and_does_nothing_twice(script, small, capsys):
    asked = [
        "--study", str(small.study), "--out", str(small.folder / "run"), "--general", f"{small.folder}/general.parquet:text",
        "--rows", "4", "--general-rows", "3",
    ]  # fmt: skip
    script.main([*asked, "--arms", "rounds,refreshed"])
    files = {f: f.stat().st_mtime_ns for f in (small.folder / "run" / "records").iterdir()}
    assert {f.name for f in files} == {"rounds-1-rounds.json", "rounds-1-refreshed.json"}
    for file in files:
        record = json.loads(file.read_text())
        assert record["tasks"] == ["one", "two"] and all(len(record[k]) == 2 for k in ("alone", "floor"))
        assert all(len(m["scores"][0]) == 2 and m["general_kl"] > 0 for m in record["merges"].values())
        assert 0 < record["seconds_trained"] < record["seconds"] and set(record["general_kl_alone"]) == {"one", "two"}
    script.main([*asked, "--arms", "rounds,refreshed"])
    assert {f: f.stat().st_mtime_ns for f in files} == files
    script.main([*asked, "--arms", "restarted", "--seconds", "0"])
    assert "time is up before rounds-1-restarted" in capsys.readouterr().out
