"""Many candidates in one pass predict what each predicts alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import RunError
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.model.base import draw_head, head_state
from tests.tiny import ARCHITECTURES, TARGETS, make_adapter, make_examples, make_task


def grown(adapter: Adapter, rank: int, seed: int) -> Adapter:
    """Random factors of another rank on the same modules."""
    g = torch.Generator().manual_seed(seed)
    modules = {
        n: LoraFactors(
            torch.randn(rank, f.shape[1], generator=g) * 0.2, torch.randn(f.shape[0], rank, generator=g) * 0.2, 0.5
        )
        for n, f in adapter.modules.items()
    }
    return Adapter(f"m{seed}", adapter.base, modules, target_modules=TARGETS["bert"])


def setup(base, architecture):
    tasks = {"topic": make_task(classes=3), "value": make_task("value", "regression")}
    examples = {name: make_examples(task, 23) for name, task in tasks.items()}
    evaluator = Evaluator(base, tasks, examples, batch_size=5, max_length=24)
    start = make_adapter(base, tasks["topic"], architecture)
    return evaluator, start


def heads_of(evaluator, task, seeds):
    found = []
    for seed in seeds:
        model = evaluator.task_model(task)
        draw_head(model, seed)
        found.append(head_state(model))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_candidate_predicts_as_alone(tiny_base, architecture):
    evaluator, start = setup(tiny_base(architecture), architecture)
    for task in ("topic", "value"):
        heads = heads_of(evaluator, task, range(4))
        candidates = [
            Candidate(heads[0], grown(start, 4, 1)),
            Candidate(heads[1], grown(start, 16, 2), 0.3),
            Candidate(heads[2]),
            Candidate(heads[3], grown(start, 4, 1), 0.0),
            Candidate(heads[0], grown(start, 2, 3), -1.0),
        ]
        rows = np.array([3, 17, 0, 9, 22])
        for chosen, limit in ((None, None), (rows, 2)):
            many = predict_many(evaluator, task, candidates, chosen, limit=limit)
            for c, found in zip(candidates, many, strict=True):
                expected = evaluator.predict(task, c.head, c.adapter, c.scale, chosen)
                assert found.shape == expected.shape
                np.testing.assert_allclose(found, expected, atol=3e-5, rtol=1e-4)


def test_memory_that_runs_out_loses_nobody(tiny_base, monkeypatch):
    from plait.evaluation import fleet

    evaluator, start = setup(tiny_base("bert"), "bert")
    head = heads_of(evaluator, "topic", [0])[0]
    candidates = [Candidate(head, grown(start, 4, s)) for s in range(7)]
    expected = predict_many(evaluator, "topic", candidates)
    real = fleet._predict

    def small(ends, part, *rest):
        if len(part) > 2:
            raise torch.OutOfMemoryError("no")
        return real(ends, part, *rest)

    monkeypatch.setattr(fleet, "_predict", small)
    for a, b in zip(predict_many(evaluator, "topic", candidates), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_infinite_predictions_are_named(tiny_base):
    evaluator, start = setup(tiny_base("bert"), "bert")
    head = heads_of(evaluator, "topic", [0])[0]
    huge = {n: LoraFactors(f.A * 1e30, f.B + 1e30) for n, f in start.modules.items()}
    with pytest.raises(RunError, match="bad"):
        predict_many(evaluator, "topic", [Candidate(head), Candidate(head, Adapter("bad", start.base, huge))])
