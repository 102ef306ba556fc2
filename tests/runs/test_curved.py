"""Curvature beside a run's statistics: of every module, from rows alone, the heads left as they were."""

from __future__ import annotations

import dataclasses

import torch

from plait.model.base import head_modules
from plait.runs.curved import with_curvature
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
        assert set(s.curvature) == set(s.modules) and s.sites is known[name].sites
        for module, G in s.curvature.items():
            assert G.shape == (s.modules[module].shape[0],) * 2 and float(torch.linalg.eigvalsh(G)[0]) > -1e-4 * float(
                G.trace()
            )
            assert float(G.trace()) > 0 and torch.equal(G, again[name].curvature[module])
    assert any(not torch.allclose(G, curved["grade"].curvature[m]) for m, G in curved["topic"].curvature.items())
    assert dataclasses.replace(curved["topic"], curvature={}) == known["topic"]
