"""Rounds where every answer is written: a part of a schedule beside a loop of its own, a base that wears a merge, the script small."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from plait.errors import UsageError
from plait.recipes.recipe_file import read_recipe
from plait.runs.layout import Layout
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


@pytest.fixture
def watched(script, monkeypatch) -> SimpleNamespace:
    """What fleets were made of, what each part began from and wore, and what was merged."""
    seen = SimpleNamespace(fleets=[], parts=[], merges=[])
    made, trained, rule = script.Fleet.__init__, script.Fleet.trained, script.by_rule

    def init(self, members, *rest):
        seen.fleets.append(members)
        made(self, members, *rest)

    def part(self, number, starts, worn):
        seen.parts.append((number, starts, worn))
        return trained(self, number, starts, worn)

    def by_rule(adapters, device):
        seen.merges.append((rule(adapters, device), dict(adapters)))
        return seen.merges[-1][0]

    monkeypatch.setattr(script.Fleet, "__init__", init)
    monkeypatch.setattr(script.Fleet, "trained", part)
    monkeypatch.setattr(script, "by_rule", by_rule)
    return seen


@pytest.mark.parametrize("arm", ["kaiming", "contrastive_penalised"])
def test_one_part_is_the_studys_own_training(script, small, arm):
    made = script.Fleet(small.members[arm], small.base, 1).trained(0)
    assert list(made) == ["one", "two"]
    assert all(same(made[t], small.trained[arm][t], atol=1e-7) for t in made)


@pytest.mark.parametrize("arm", ["kaiming", "contrastive_penalised"])
def test_a_later_part_on_a_worn_base_is_what_a_plain_loop_makes_of_it(script, small, arm):
    """PEFT's layers, torch's AdamW and a hook in float32 stand beside the fleet: the schedule and the rows go on, the moments do not."""
    plain = importlib.import_module("full_finetuning")
    worn = script.added(None, script.Fleet(small.members["kaiming"], small.base, 1).trained(0)["two"], 0.4)
    fleet = script.Fleet(small.members[arm], small.base, 2)
    starts = fleet.trained(0)
    made, unworn = fleet.trained(1, starts, worn), fleet.trained(1, starts)
    for m in small.members[arm]:
        looped = plain.trained(
            small.layout.session, m.task.name, starts[m.task.name], m.settings, m.statistics or {}, 1, False, part=(1, 2), carried=worn
        )  # fmt: skip
        assert same(made[m.task.name], looped, atol=2e-5)
        assert not same(unworn[m.task.name], looped, atol=2e-4)  # ten times as far
        assert not same(starts[m.task.name], looped, atol=2e-4)


def test_rounds_train_on_the_sum_of_their_merges_and_end_in_it(script, small, watched):
    run = SimpleNamespace(layout=small.layout, device="cpu")
    ended = script.run_arm(run, script.Way("kaiming", 3, merges=True), 1, {})
    assert [(n, s) for n, s, _ in watched.parts] == [(0, None), (1, None), (2, None)]  # the first factors each time
    (whole, scale), *_ = ended.merges.values()
    assert scale == 1.0 and list(ended.scales.values()) == [watched.merges[0][0][1]]
    worn = [w for *_, w in watched.parts]
    for name, f in whole.modules.items():
        parts = [s * made.modules[name].delta() for (made, s), _ in watched.merges]
        before = worn[2].modules[name].delta()
        assert worn[0] is None and torch.allclose(worn[1].modules[name].delta(), parts[0], atol=1e-6)
        assert torch.allclose(before, parts[0] + parts[1], atol=1e-6) and torch.allclose(
            f.delta(), sum(parts), atol=1e-6
        )
        for task, own in ended.own.items():  # what its last part was trained as
            last = watched.merges[2][1][task].modules[name].delta()
            assert torch.allclose(own.modules[name].delta(), before + last, atol=1e-6) and last.norm() > 0


@pytest.mark.parametrize("order", [("restarted", "refreshed"), ("refreshed", "restarted")])
def test_moments_taken_halfway_are_what_the_second_half_is_penalised_by(script, small, watched, order):
    run, begun = SimpleNamespace(layout=small.layout, device="cpu"), {}
    ended = {arm: script.run_arm(run, script.ARMS[arm], 1, begun) for arm in order}
    parts = [n for n, *_ in watched.parts]
    assert parts == [0, 1, 1]  # one first half serves both
    halfway = [s for n, s, _ in watched.parts if n == 1]
    assert halfway[0] is halfway[1] and all(w is None for *_, w in watched.parts)
    old = small.members["contrastive_penalised"][0].statistics["two"]
    used = [{id(m.statistics): m.statistics["two"] for m in members} for members in watched.fleets]
    assert all(len(u) == 1 for u in used)  # all members read the same

    def off(statistics) -> list[float]:
        return [float((m.second - statistics.sites[s].second).norm() / m.second.norm()) for s, m in old.sites.items()]

    moved = [off(*u.values()) for u in used]
    fresh = moved.pop(1)  # restarted, or the first half and then restarted again, read the old ones
    assert all(max(m) == 0.0 for m in moved)
    assert max(fresh) > 1e-3 and min(fresh) < 1e-5  # what comes before the first adapted module stays
    assert not same(ended["restarted"].own["one"], ended["refreshed"].own["one"], atol=1e-6)
    assert set(ended["refreshed"].merges) == {"task_arithmetic, by rule", "task_arithmetic"}


def test_fewer_steps_than_parts_are_refused(script, small):
    with pytest.raises(UsageError, match="4 steps in 5 parts"):
        script.Fleet(small.members["kaiming"], small.base, 5)


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
        assert 0 < record["seconds_trained"] <= record["seconds"] and set(record["general_kl_alone"]) == {"one", "two"}
    script.main([*asked, "--arms", "rounds,refreshed"])
    assert {f: f.stat().st_mtime_ns for f in files} == files
    script.main([*asked, "--arms", "restarted", "--seconds", "0"])
    assert "time is up before rounds-1-restarted" in capsys.readouterr().out
