"""Full fine-tuning beside LoRA: the dense update is what is trained, penalised and merged; the script's small version."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from plait.runs.session import Session
from plait.statistics.moments import Statistics
from plait.training import TrainingSettings
from tests.conftest import tiny_raw

ROOT = Path(__file__).parents[1]
SETTINGS = TrainingSettings(steps=6, lr=1e-2, batch_size=4, max_length=24)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_finetuning", ROOT / "benchmarks" / "full_finetuning.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_shift(adapter, own: Statistics, other: Statistics) -> float:
    """tr(D m D^T) / tr(W0 m W0^T) on another task, over modules."""
    total = 0.0
    for name, f in adapter.modules.items():
        info = other.modules[other.relative(name)]
        D, S = f.delta(torch.float64), other.sites[info.site].dense().double()
        total += float(torch.trace(D @ S @ D.T)) / info.output_energy
    return total


def test_a_dense_update_is_trained_itself_and_its_penalty_holds_it_off_the_others(script, tiny_recipe):
    session = Session(tiny_recipe("bert", tasks=["topic", "grade"]))
    statistics = script.statistics_of(session, 0)
    first = script.starts(session, statistics, "full", 0)["topic"]
    shifts = {}
    for kind, beta in (("free", 0.0), ("penalised", 300.0)):
        settings = TrainingSettings(
            steps=6, lr=1e-2, batch_size=4, max_length=24, constraint=kind,
            constraint_options={"beta": beta} if beta else {},
        )  # fmt: skip
        made = script.trained(session, "topic", first, settings, statistics, 0, True)
        for f in made.modules.values():
            assert torch.equal(f.A, torch.eye(f.shape[1])) and f.scaling == 1.0
        assert max(torch.linalg.matrix_rank(f.B) for f in made.modules.values()) > session.recipe.lora.rank
        shifts[kind] = relative_shift(made, statistics["topic"], statistics["grade"])
    assert 0 < shifts["penalised"] < 0.5 * shifts["free"]


def test_the_small_version_runs_to_its_page_and_goes_on_where_it_was(script, tiny_base, tmp_path):
    raw = tiny_raw(tiny_base("bert"), "bert", tmp_path / "data", ["topic", "grade"])
    raw["training"] = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw | {"tuning_rows": 2, "grid_rows": 4}))
    arms = "full@1e-3,contrastive_penalised@1e-2"
    given = ["--study", str(study), "--out", str(tmp_path / "run"), "--arms", arms, "--to", str(tmp_path)]
    script.main(given)
    rows = json.loads((tmp_path / "full-finetuning.json").read_text())["rows"]
    assert [(r["arm"], r["method"]) for r in rows] == [
        (a.split("@")[0], m) for a in arms.split(",") for m in script.MERGES
    ]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "records").iterdir()}
    script.main(given)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "records").iterdir()}
    assert "| `full` | 0.001 | 1 |" in (tmp_path / "full-finetuning.md").read_text()


def test_rows_are_shares_of_own_gain(script):
    merges = {"tsv": {"scales": [0.5, 0.7], "tasks": {"a": 40.0, "b": 50.0}}}
    record = {"arm": "full", "rate": 1e-4, "seed": 0, "alone": {"a": 60.0, "b": 70.0}, "floor": {"a": 20.0, "b": 30.0}}
    (row,) = script.rows_of([{**record, "merges": merges, "norms": {"a": 1.0, "b": 3.0}}])
    assert (row["recovered"], row["individual"], row["merged"], row["norm"]) == (0.5, 65.0, 45.0, 2.0)


def test_a_record_is_there_whole_or_not_at_all(script, tmp_path):
    place = tmp_path / "records" / "full@1e-3-0.json"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.kept(place, interrupted)
    assert not list(place.parent.iterdir())
    assert script.kept(place, lambda: {"arm": "full"}) == {"arm": "full"}
    assert script.kept(place, interrupted) == {"arm": "full"}  # not made again
