"""Rounds of train and merge, and moments refreshed halfway: the script's small version, and what its sums are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from plait.runs.session import Session
from tests.conftest import tiny_raw

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("rounds")


def test_rounds_carry_the_sum_of_their_merges(script, tiny_recipe, monkeypatch):
    recipe = tiny_recipe("bert", tasks=["topic", "grade"], training={"steps": 4, "batch_size": 4, "lr": 1e-2})
    session, worn, merges = Session(recipe), [], []

    def trained(*given, part, carried):
        worn.append((part, carried))
        return real(*given, part=part, carried=carried)

    def by_rule(adapters, device):
        merges.append(rule(adapters, device))
        return merges[-1]

    real, rule = script.trained, script.by_rule
    monkeypatch.setattr(script, "trained", trained)
    monkeypatch.setattr(script, "by_rule", by_rule)
    adapters, merged = script.run_arm(session, script.Way("kaiming", False, 2, merges=True), 0)
    assert [p for p, _ in worn] == [(0, 2), (0, 2), (1, 2), (1, 2)] and [c is None for _, c in worn] == [
        True,
        True,
        False,
        False,
    ]
    (first, scale), (second, _) = merges
    for name, f in merged.modules.items():
        whole = scale * (first.modules[name].delta() + second.modules[name].delta())
        assert torch.allclose(f.delta(), whole, atol=1e-6) and whole.norm() > 0
        assert torch.allclose(worn[-1][1].modules[name].delta(), scale * first.modules[name].delta(), atol=1e-6)
    assert set(adapters) == {"topic", "grade"} and all(a.heads for a in adapters.values())


def test_moments_with_adapters_on_are_others_and_are_what_the_second_half_is_penalised_by(
    script, tiny_recipe, monkeypatch
):
    recipe = tiny_recipe("bert", tasks=["topic", "grade"], training={"steps": 4, "batch_size": 4, "lr": 5e-2})
    seen, real = [], script.trained

    def trained(session, task, start, settings, statistics, *rest, **more):
        seen.append(statistics["grade"])
        return real(session, task, start, settings, statistics, *rest, **more)

    monkeypatch.setattr(script, "trained", trained)
    script.run_arm(Session(recipe), script.ARMS["refreshed"], 0)
    assert seen[0] is seen[1] and seen[2] is seen[3]
    changed = [float((m.second - seen[2].sites[s].second).norm() / m.second.norm()) for s, m in seen[0].sites.items()]
    assert min(changed) == 0.0 and max(changed) > 1e-3  # what comes before the first adapted module stays


def test_the_small_version_runs_to_its_page(script, tiny_base, tmp_path):
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic", "grade"])
    raw["training"] = {"steps": 4, "batch_size": 4, "lr": 1e-3}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw | {"tuning_rows": 2, "grid_rows": 4}))
    arms = "kaiming,rounds_penalised"
    script.main(["--study", str(study), "--out", str(tmp_path / "run"), "--arms", arms, "--to", str(tmp_path)])
    rows = json.loads((tmp_path / "rounds.json").read_text())["rows"]
    assert [r["arm"] for r in rows] == arms.split(",") and set(rows[0]["merged"]) == {"topic", "grade"}
    assert "| `rounds_penalised` | 1 |" in (tmp_path / "rounds.md").read_text()


def test_differences_are_over_tasks_of_the_seeds_that_both_arms_have(script):
    def record(arm, seed, *merged):
        ends = {k: {"a": 10.0 * i, "b": 5.0} for i, k in ((9, "alone"), (0, "floor"))}
        return {"arm": arm, "seed": seed, **ends, "merged": dict(zip("ab", merged, strict=True))}

    records = [record("kaiming", 0, 40.0, 50.0), record("kaiming", 1, 0.0, 0.0), record("rounds", 0, 42.0, 51.0)]
    text = script.page(records, "")
    assert "| `rounds` - `kaiming` | 1 | +1.5 | -4.9 to +7.9 |" in text and "| `refreshed`" not in text
    assert "Not run: `penalised`, `rounds_penalised`, `restarted`, `refreshed`." in text


def test_a_page_of_what_is_there_trains_nothing(script, tiny_base, tmp_path):
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic", "grade"])
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw | {"tuning_rows": 2, "grid_rows": 4, "seeds": [0, 1]}))
    place = tmp_path / "run" / "records" / "kaiming-1.json"
    place.parent.mkdir(parents=True)
    place.write_text(
        json.dumps({"arm": "kaiming", "seed": 1, **{k: {"topic": 50.0} for k in ("alone", "merged", "floor")}})
    )
    script.main(["--study", str(study), "--out", str(tmp_path / "run"), "--page-only", "--to", str(tmp_path)])
    assert "seeds 1;" in (tmp_path / "rounds.md").read_text() and len(list(place.parent.iterdir())) == 1
