"""What is said of adapters before they are merged, against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.evaluation.features import FEATURES, features, task_vector_norm
from plait.statistics.moments import ModuleInfo, Moments, Statistics

SHAPES = {"q": (5, 6), "v": (4, 6)}
TASKS = ("one", "two", "three")


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def adapters():
    """Ranks 2, 3 and 2, scalings 0.5, 1 and 2, so that no two norms are alike."""
    made = {}
    for i, task in enumerate(TASKS):
        rank, factors = 2 + i % 2, {}
        for j, (module, (out, width)) in enumerate(SHAPES.items()):
            seed = 10 * i + 2 * j
            factors[module] = LoraFactors(drawn(rank, width, seed=seed), drawn(out, rank, seed=seed + 1), 0.5 * 2.0**i)
        made[task] = Adapter(task, "base", factors)
    return made


@pytest.fixture
def inputs():
    """Task -> the inputs (20, 6) that both modules read."""
    return {task: drawn(20, 6, seed=100 + i) * (i + 1) for i, task in enumerate(TASKS)}


def statistics_of(inputs):
    found = {}
    for task, rows in inputs.items():
        modules = {m: ModuleInfo("q", shape, 7.0 + shape[0]) for m, shape in SHAPES.items()}
        found[task] = Statistics({"q": Moments(len(rows), rows.sum(0), rows.T @ rows)}, modules)
    return found


def test_predictors_are_what_dense_arithmetic_gives(adapters, inputs):
    deltas = {
        t: {m: (f.scaling * f.B @ f.A).numpy() for m, f in adapter.modules.items()} for t, adapter in adapters.items()
    }
    vectors = {t: np.concatenate([deltas[t][m].ravel() for m in SHAPES]) for t in TASKS}
    found = features(adapters, statistics_of(inputs))
    assert {f for one in found.values() for f in one} == set(FEATURES)
    for task in TASKS:
        others = [t for t in TASKS if t != task]
        own = np.linalg.norm(vectors[task])
        assert task_vector_norm(adapters[task]) == pytest.approx(own, rel=1e-6)
        together = np.linalg.norm(np.concatenate([vectors[t] for t in others]))
        assert found[task]["norm"] == pytest.approx(together / own, rel=1e-6)
        cosines = [abs(vectors[t] @ vectors[task]) / np.linalg.norm(vectors[t]) / own for t in others]
        assert found[task]["cosine"] == pytest.approx(np.mean(cosines), rel=1e-6)
        moved = [
            np.mean([np.sum((inputs[task].numpy() @ deltas[t][m].T) ** 2) / (7.0 + SHAPES[m][0]) for m in SHAPES])
            for t in others
        ]
        assert found[task]["shift"] == pytest.approx(np.sum(moved), rel=1e-5)
        shared = [shared_span(adapters[t].modules[m].A, adapters[task].modules[m].A) for t in others for m in SHAPES]
        assert found[task]["overlap"] == pytest.approx(np.mean(shared), rel=1e-6)


def shared_span(one, other):
    """The mean squared cosine of the angles between two row spaces, from projectors."""
    projectors = [np.linalg.pinv(a.numpy()) @ a.numpy() for a in (one, other)]
    return np.trace(projectors[0] @ projectors[1]) / min(len(one), len(other))
