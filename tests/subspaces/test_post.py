"""Moving trained adapters into subspaces: exact where they fit, best where they do not."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError, UsageError
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.subspaces.compute import Subspace
from plait.subspaces.post import move_into, refit


def made(seed=0, out=7, d=12, rank=3):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, d, generator=g), torch.randn(out, rank, generator=g), 0.5)


def rows(k, d=12, seed=1, norm=2.0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=g))[0].T.contiguous() * norm


def moments(d=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, d, generator=g) * torch.logspace(0, -2, d)
    return Moments(200, X.sum(0), X.T @ X)


def test_a_delta_inside_the_subspace_is_kept_whole():
    f = made()
    inside = torch.linalg.qr(f.A.T)[0].T @ torch.eye(12)
    for inputs in (None, moments()):
        B, kept = refit(f, inside, inputs)
        assert kept == pytest.approx(1.0, abs=1e-6)
        assert torch.allclose((B @ inside.double()).float(), f.delta(), atol=1e-5)


@pytest.mark.parametrize("inputs", [None, moments()])
def test_no_other_b_is_nearer(inputs):
    f, A = made(), rows(4)
    B, kept = refit(f, A, inputs)
    M = torch.eye(12).double() if inputs is None else inputs.dense().double()
    D = f.delta(torch.float64)

    def lost(candidate):
        E = D - candidate @ A.double()
        return float(torch.trace(E @ M @ E.T))

    assert kept == pytest.approx(1 - lost(B) / float(torch.trace(D @ M @ D.T)), abs=1e-9)
    g = torch.Generator().manual_seed(3)
    for _ in range(50):
        assert lost(B + 0.01 * torch.randn(B.shape, generator=g).double()) > lost(B)


def test_own_inputs_keep_more_of_what_matters():
    f, A, inputs = made(), rows(4), moments()
    M, D = inputs.dense().double(), f.delta(torch.float64)

    def on_inputs(B):
        E = D - B @ A.double()
        return float(torch.trace(E @ M @ E.T))

    assert on_inputs(refit(f, A, inputs)[0]) < on_inputs(refit(f, A)[0])


def adapter_and_statistics():
    f = made()
    adapter = Adapter("t", "base", {"model.layer.q": f}, task_type="CAUSAL_LM")
    info = {"layer.q": ModuleInfo("layer.q", (7, 12), 1.0)}
    return adapter, Statistics({"layer.q": moments()}, info, {"backbone_prefix": "model"})


def test_an_adapter_moves_and_says_what_it_lost():
    adapter, statistics = adapter_and_statistics()
    A = rows(4, norm=1.0)
    subspaces = {"layer.q": Subspace(A, torch.ones(4).double(), 2.0, "contrastive")}
    moved, kept = move_into(adapter, subspaces, statistics=statistics)
    assert torch.equal(moved.modules["model.layer.q"].A, A * 2.0)
    assert 0 < kept["model.layer.q"] < 1
    again, whole = move_into(moved, subspaces, statistics=statistics)
    assert whole["model.layer.q"] == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(again.modules["model.layer.q"].delta(), moved.modules["model.layer.q"].delta(), atol=1e-5)


def test_zero_deltas_and_what_cannot_be_moved():
    adapter, statistics = adapter_and_statistics()
    f = adapter.modules["model.layer.q"]
    B, kept = refit(LoraFactors(f.A, torch.zeros_like(f.B)), rows(4))
    assert kept == 1.0 and not B.any()
    with pytest.raises(InputError, match="no subspace"):
        move_into(adapter, {})
    narrow = {"layer.q": Subspace(rows(2, d=5), torch.ones(2).double(), None, "x")}
    with pytest.raises(InputError, match="width 5"):
        move_into(adapter, narrow, statistics=statistics)
    words = Adapter("e", "base", {"layer.q": LoraFactors(f.A, f.B, 1.0, "embedding")})
    with pytest.raises(UsageError, match="embedding"):
        move_into(words, narrow)
