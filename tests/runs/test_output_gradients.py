"""Output gradients beside a run's statistics: of every module, from rows alone, the heads left as they were."""

from __future__ import annotations

import torch

from plait.model.base import head_modules
from plait.runs.output_gradients import with_curvature
from plait.runs.session import Session
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
