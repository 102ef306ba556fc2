"""Full fine-tuning beside LoRA: the dense update is what is trained, penalised and merged; the script's small version."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from plait.adapters.lora import Adapter, LoraFactors
from plait.evaluation.protocol import Scorer
from plait.evaluation.splits import Split
from plait.merging import merge
from plait.model.base import load_task_model
from plait.recipes.sections import TaskSpec
from plait.runs.session import Session
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.training import TrainingSettings, attach_constraint, prepare_constraint
from plait.training.constraints import freeze_rows
from plait.training.peft_model import attach, detach, for_task
from tests.conftest import tiny_raw, write_rows

ROOT = Path(__file__).parents[1]
TaskList = TypeAdapter(list[TaskSpec])


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("full_finetuning")


@pytest.fixture
def dense(script):
    return importlib.import_module("dense_updates")


def an_adapter(name, *modules, seed=0):
    """Dense updates of random values, all of them full."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {m: torch.randn(shape, generator=generator) for m, shape in modules}
    like = {m: LoraFactors(torch.zeros(1, d.shape[1]), torch.zeros(len(d), 1)) for m, d in deltas.items()}
    return Adapter(name, "base", like), deltas


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


def by_peft(script, session, task, start, settings, statistics):
    """The same training with PEFT's layers: A the identity, which stays."""
    spec = session.tasks[task]
    rows = script.encode(session.evaluator.tokenizer, spec, session.training(task, 0), settings.max_length)
    model = load_task_model(session.base, spec, seed=0)
    started = for_task(start, spec, model)
    modules = {
        m: LoraFactors(torch.eye(f.shape[1]), torch.zeros(f.shape), 1.0, f.kind) for m, f in started.modules.items()
    }
    started = replace(started, modules=modules)
    peft_model = attach(model, started)
    freeze_rows(peft_model)
    optimizer = script.adamw(peft_model, settings)
    attach_constraint(optimizer, peft_model, prepare_constraint(settings, started, statistics, task=task, device="cpu"))
    script.run_steps(peft_model, optimizer, session, task, settings, rows, 0, (0, 1))
    return detach(peft_model, started, {})


@pytest.mark.parametrize("constraint", ["free", "penalised"])
@pytest.mark.parametrize("architecture", ["mpnet", "llama"])
def test_a_dense_update_is_what_factors_with_the_identity_learn(script, tiny_recipe, architecture, constraint):
    recipe = tiny_recipe(architecture, tasks=["topic", "grade"])
    if architecture == "llama":
        recipe = recipe.model_copy(update={"tasks": TaskList.validate_python(answered(Path(recipe.data.root)))})
    session = Session(recipe)
    statistics = script.statistics_of(session, 0)
    settings = TrainingSettings(steps=4, lr=1e-3, batch_size=4, max_length=24, constraint=constraint)
    task = next(iter(session.tasks))
    start = script.starts(session, statistics, "full", 0)[task]
    one = script.trained(session, task, start, settings, statistics, 0, True)
    other = by_peft(script, session, task, start, settings, statistics)
    assert sorted(one.modules) == sorted(other.modules) and len(one.modules) == {"mpnet": 12, "llama": 14}[architecture]
    for name, f in other.modules.items():
        assert torch.allclose(one.modules[name].B, f.B, atol=2e-5), name
    assert one.heads.keys() == other.heads.keys() == ({task} if architecture == "mpnet" else set())
    for name, tensor in other.heads.get(task, {}).items():
        assert torch.allclose(one.heads[task][name], tensor, atol=2e-5), name


def test_dense_updates_merge_as_their_factors_do(dense):
    shapes = (("q", (12, 12)), ("down", (12, 30)), ("up", (30, 12)))
    pairs = [an_adapter(n, *shapes, seed=i) for i, n in enumerate(("a", "b", "c"))]
    adapters = {a.name: dense.as_adapter(a, d) for a, d in pairs}
    sites = {(t, m): torch.randn(40, width) for t in adapters for m, (_, width) in shapes}
    infos = {m: ModuleInfo(m, shape, 1.0) for m, shape in shapes}
    statistics = {
        t: Statistics({m: Moments(40, x.sum(0), x.T @ x) for (u, m), x in sites.items() if u == t}, infos, {})
        for t in adapters
    }
    for method in ("task_arithmetic", "regmean", "tsv"):
        given = list(adapters.values())
        if method == "tsv":
            given = [replace(a, modules={m: by_svd(f, 3) for m, f in a.modules.items()}) for a in given]
        whole = merge(given, method, scale=1.0, statistics=statistics if method == "regmean" else None).adapter
        made = dense.merged(adapters, method, statistics, torch.device("cpu"))
        for m, f in whole.modules.items():
            assert torch.equal(made.modules[m].A, torch.eye(f.shape[1]))
            assert torch.allclose(made.modules[m].B, f.delta(), rtol=1e-4, atol=1e-4), (method, m)


def by_svd(f, tasks):
    U, S, Vh = torch.linalg.svd(f.B.double(), full_matrices=False)
    k = min(f.shape) // tasks
    return LoraFactors(Vh[:k].float(), (U[:, :k] * S[:k]).float())


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_dense_update_is_worn_as_its_factors_are(dense, script, tiny_recipe, architecture):
    recipe = tiny_recipe(architecture, tasks=["topic", "grade"])
    if architecture == "llama":
        recipe = recipe.model_copy(update={"tasks": TaskList.validate_python(answered(Path(recipe.data.root)))})
    session = Session(recipe)
    task = next(iter(session.tasks))
    start = script.starts(session, script.statistics_of(session, 0), "full", 0)[task]
    start = for_task(start, session.tasks[task], session.evaluator.task_model(task))
    deltas = {m: 0.3 * torch.randn(f.shape) for m, f in start.modules.items()}
    adapter, head = (
        dense.as_adapter(start, deltas),
        {k: torch.randn_like(v) for k, v in start.heads.get(task, {}).items()},
    )
    predict = session.evaluator.predict
    with dense.worn(session.evaluator.task_model(task), adapter, 0.7):
        one = predict(task, head, None)
    assert np.allclose(one, predict(task, head, adapter, 0.7), atol=1e-4)
    assert not np.allclose(one, predict(task, head, None), atol=1e-2)
    rows = np.arange(24)
    split = {task: Split(rows[:0], {"A": rows, "B": rows}, {"A": rows, "B": rows})}
    pairs = [(adapter, 0.7), (None, 0.0)]
    kinds = [
        kind(session.evaluator, split, {task: head}).answers(task, pairs, rows) for kind in (dense.DenseScorer, Scorer)
    ]
    assert all(np.allclose(x, y, atol=1e-4) for x, y in zip(*kinds, strict=True))


def answered(root: Path) -> list[dict[str, object]]:
    """Two tasks of a decoder that chooses among words, as a recipe has them; writes their rows."""
    made = []
    for i, (name, labels) in enumerate((("first", ["w1", "w2 w3"]), ("second", ["w4", "w5", "w6 w7"]))):
        for split, rows in (("train", 24), ("validation", 24)):
            draws = np.random.default_rng([i, rows, split == "train"]).integers(8, 60, (rows, 4))
            columns = [
                {"text": " ".join(f"w{w}" for w in row), "label": labels[n % len(labels)]}
                for n, row in enumerate(draws)
            ]
            write_rows(root / f"{name}.{split}.jsonl", columns)
        files = {k: f"{name}.{k}.jsonl" for k in ("train", "validation")}
        made.append({"name": name, "kind": "causal", "text": ["text"], "labels": labels, **files})
    return made


def test_a_decoder_runs_to_a_page_of_its_own(script, tiny_base, tmp_path):
    raw = tiny_raw(tiny_base("llama"), "llama", tmp_path / "data", [])
    raw |= {"tasks": answered(tmp_path / "data"), "training": {"steps": 2, "batch_size": 4, "lr": 1e-3}}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw | {"tuning_rows": 2, "grid_rows": 4}))
    arms = "full@1e-3,full_penalised@1e-3,full_penalised@3e-3,kaiming@1e-2,contrastive_penalised@1e-2"
    out = tmp_path / "run"
    script.main(["--study", str(study), "--out", str(out), "--arms", arms, "--to", str(tmp_path), "--name", "decoder"])
    rows = json.loads((tmp_path / "decoder.json").read_text())["rows"]
    assert [f"{r['arm']}@{r['rate']:g}" for r in rows[::3]] == [
        f"{n}@{float(r):g}" for n, r in (a.split("@") for a in arms.split(","))
    ]
    assert all(set(r["tasks"]) == {"first", "second"} and r["norm"] > 0 for r in rows)
    text = (tmp_path / "decoder.md").read_text()
    assert "No heads: the floor is the bare base." in text and "--name decoder" in text
    assert not (tmp_path / "full-finetuning.md").exists()
    assert not list((out / "updates").iterdir()) and len(list((out / "records").iterdir())) == 5


def test_what_was_trained_before_an_interruption_is_not_trained_again(script, tiny_recipe, tmp_path, monkeypatch):
    training = {"steps": 2, "batch_size": 4}
    session = Session(tiny_recipe("bert", tasks=["topic", "grade"], training=training, tuning_rows=2, grid_rows=4))
    real, calls = script.trained, []

    def trained(session, task, *rest, **more):
        calls.append(task)
        if calls.count("grade") == 1 and task == "grade":
            raise KeyboardInterrupt
        return real(session, task, *rest, **more)

    monkeypatch.setattr(script, "trained", trained)
    moments = functools.cache(functools.partial(script.statistics_of, session))
    for arm in ("full", "contrastive_penalised"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            script.record_of(session, arm, 1e-3, 0, tmp_path / arm, moments)
        again = script.record_of(session, arm, 1e-3, 0, tmp_path / arm, moments)
        assert calls == ["topic", "grade", "grade"], arm
        whole = script.record_of(session, arm, 1e-3, 0, tmp_path / "other", moments)
        calls.append("grade")
        assert {**again, "seconds": 0} == {**whole, "seconds": 0}
        script.record_of(session, arm, 2e-3, 0, tmp_path / arm, moments)  # of another rate: what lies there is not it
        assert calls[-2:] == ["topic", "grade"]


def test_a_loss_that_is_no_number_names_its_step(script, tiny_recipe):
    session = Session(tiny_recipe("bert", tasks=["topic", "grade"]))
    settings = TrainingSettings(steps=3, lr=1e30, batch_size=4, max_length=24, max_grad_norm=0.0)
    start = script.starts(session, script.statistics_of(session, 0), "full", 0)["topic"]
    with pytest.raises(SystemExit, match=r"topic: the loss is (nan|inf) at step [12]"):
        script.trained(session, "topic", start, settings, {}, 0, True)


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
    for alone in ({"a": 20.0, "b": 30.0}, {"a": 10.0, "b": 30.0}):  # nothing gained, or lost: no share of it
        (row,) = script.rows_of([{**record, "alone": alone, "merges": merges, "norms": {"a": 1.0}}])
        assert row["recovered"] is None and "| 45.0 | - |" in script.page([row], "")


def test_a_record_is_there_whole_or_not_at_all(script, tmp_path):
    place = tmp_path / "records" / "full@1e-3-0.json"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.kept(place, interrupted)
    assert not list(place.parent.iterdir())
    assert script.kept(place, lambda: {"arm": "full"}) == {"arm": "full"}
    assert script.kept(place, interrupted) == {"arm": "full"}  # not made again


def test_arms_are_compared_at_rates_whose_scores_alone_agree(script):
    assert script.agreeing({1e-5: 60.0, 1e-4: 80.0, 1e-3: 70.0}, {1e-4: 79.5, 1e-3: 60.2}) == (1e-4, 1e-4)
    assert script.agreeing({1e-5: 60.0, 1e-4: 70.0}, {1e-4: 80.0}) == (1e-4, 1e-4)  # the nearest

    def rows(arm, rate, alone, merged):
        row = {"arm": arm, "rate": rate, "seed": 0, "method": "tsv", "individual": alone, "merged": merged}
        return row | {"recovered": (merged - 20) / (alone - 20), "scale": [1.0, 1.0], "norm": 1.0}

    given = [rows("full", 1e-5, 60.0, 30.0), rows("full", 1e-4, 80.0, 40.0), rows("full_penalised", 1e-4, 80.0, 50.0)]
    text = script.page(given, "")
    assert "| `full_penalised@0.0001` | `full@0.0001` | +0.0 | tsv | +10.0 | +17 |" in text
    assert "At like scores alone" not in script.page(given[:2], "")
