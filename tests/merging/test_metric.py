"""Cuts in the metric of the inputs: the optimum, and that factors are cut as their dense update is."""

from __future__ import annotations

import pytest
import torch

from plait.adapters.lora import LoraFactors, truncated
from plait.merging.metric import cut_factors, cut_solution


def drawn(seed: int, out: int = 7, width: int = 9, rank: int = 6):
    g = torch.Generator().manual_seed(seed)
    f = LoraFactors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), 0.5)
    h = torch.randn(20, width, generator=g, dtype=torch.float64) * torch.logspace(0, -3, width, dtype=torch.float64)
    return f, h.T @ h


def energy(D, S) -> float:
    return float(((D @ S) * D).sum())


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_svd_in_the_whitened_space(seed, rank):
    """Eckart and Young on D S^(1/2), computed by a dense SVD."""
    f, S = drawn(seed)
    D = f.delta(torch.float64)
    L = torch.linalg.cholesky(S)
    U, s, Vt = torch.linalg.svd(D @ L, full_matrices=False)
    wanted = torch.linalg.solve_triangular(L, U[:, :rank] * s[:rank] @ Vt[:rank], upper=False, left=False)
    for cut, lost in (cut_factors(f, S, rank), cut_solution(D, D @ S, rank)):
        assert cut.rank == rank and cut.A.dtype == cut.B.dtype == torch.float32
        rest = energy(cut.delta(torch.float64) - wanted, S)
        assert rest <= 1e-11 * energy(D, S)
        assert lost == pytest.approx(float((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-9)


def test_outputs_are_nearer_than_after_a_cut_of_the_weights():
    f, S = drawn(7)
    D = f.delta(torch.float64)
    here, _ = cut_factors(f, S, 2)
    plain, _ = truncated(f, 2)
    assert energy(D - here.delta(torch.float64), S) < 0.9 * energy(D - plain.delta(torch.float64), S)


def test_white_inputs_give_the_usual_cut():
    f, _ = drawn(8)
    here, lost = cut_factors(f, torch.eye(9, dtype=torch.float64) * 3.0, 2)
    plain, gone = truncated(f, 2)
    torch.testing.assert_close(here.delta(), plain.delta(), atol=1e-5, rtol=1e-5)
    assert lost == pytest.approx(gone, abs=1e-6)


def test_nothing_to_cut_and_nothing_at_all():
    f, S = drawn(9)
    same, lost = cut_factors(f, S, 6)
    assert lost == 0.0
    torch.testing.assert_close(same.delta(), f.delta())
    whole, lost = cut_factors(f, S, f.rank)  # at its own rank it is not turned either
    assert torch.equal(whole.A, f.A.float()) and torch.equal(whole.B, f.folded().B.float()) and lost == 0.0
    zero = LoraFactors(f.A, torch.zeros_like(f.B))
    cut, lost = cut_factors(zero, S, 2)
    assert lost == 0.0 and not cut.delta().any()
