"""Output gradients beside a run's statistics: of every module, from rows alone, the heads left as they were."""

from __future__ import annotations

import torch

from plait.model.base import head_modules
from plait.runs.layout import Layout
from plait.runs.output_gradients import with_curvature
from plait.runs.session import Session
from plait.runs.units import STATISTICS, TRAIN
from plait.runs.waves import waves
from plait.statistics import collect_statistics
from plait.tasks import batches
from plait.tasks.encoding import encode


def test_curvature_stands_beside_statistics_and_heads_come_back(tiny_recipe):
    session = Session(tiny_recipe("bert", tasks=["topic", "grade"]))  # classes, and a regression
    evaluator, known = session.evaluator, {}
    for name, task in session.tasks.items():
        rows = encode(evaluator.tokenizer, task, session.sample(name, 0), 24)
        model = evaluator.task_model(name)
        known[name] = collect_statistics(
            model, batches(evaluator.tokenizer, rows, 8), session.recipe.adapted.target_modules
        )
    models = [evaluator.task_model(t) for t in session.tasks]
    heads = [p for m in models for n in head_modules(m) for p in m.get_submodule(n).parameters()]
    for p in heads:  # a base without a head leaves them unwritten: what lay there may be NaN, which equals nothing
        torch.nn.init.normal_(p)
    before = [p.detach().clone() for p in heads]
    curved, again = (with_curvature(known, session, 0) for _ in range(2))
    assert heads and all(torch.equal(p, b) for p, b in zip(heads, before, strict=True))
    for name, s in curved.items():
        assert set(s.output_gradients) == set(s.modules) and s.sites is known[name].sites
        assert s.provenance["output_gradients"]["head"] == "drawn for every batch"
        for module, G in s.output_gradients.items():
            assert G.dim == s.modules[module].shape[0] and G.trace > 0
            assert G.count == next(iter(s.sites.values())).count
            assert torch.equal(G.dense(), again[name].output_gradients[module].dense())
    grade = curved["grade"].output_gradients
    assert any(not torch.allclose(G.dense(), grade[m].dense()) for m, G in curved["topic"].output_gradients.items())
    assert with_curvature(curved, session, 1) == curved  # what is there already is not taken again


def test_units_are_of_a_batch_size_where_answers_are_drawn_by_batches(tiny_recipe, tmp_path):
    """Sums of inputs are the same for any batch size; output gradients, and a penalty that reads them, are not."""
    curved = {"name": "curved", "subspace": "contrastive"}
    curved["training"] = {"constraint": "penalised", "constraint_options": {"curvature": True}}

    def keys(batch_size, **statistics):
        recipe = tiny_recipe(
            "bert",
            tasks=["topic", "grade"],
            arms=["contrastive", curved],
            statistics={"samples": 8, "pool": "token", "batch_size": batch_size, **statistics},
        )
        layout = Layout(recipe, tmp_path / "run")
        units = {(u.stage, u.arm): u for _, wave in waves(layout) for u in wave if u.stage in (STATISTICS, TRAIN)}
        return {name: layout.key(u) for name, u in units.items()}

    plain, other, two, four = keys(4), keys(8), keys(4, output_gradients=True), keys(8, output_gradients=True)
    assert {n for n in plain if plain[n] != other[n]} == {(TRAIN, "curved")}
    assert {n for n in two if two[n] != four[n]} == set(two)
    assert {n for n in plain if plain[n] != two[n]} == set(plain)
