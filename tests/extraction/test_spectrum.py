"""The cut against slow twins: the SVD, and the weighted SVD through an inverse root."""

from __future__ import annotations

import pytest
import torch

from plait.extraction import spectrum
from plait.extraction.spectrum import extracted, loss_of
from tests.merging.test_same_bytes import threads


def matrix(out: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(out, width)
    left, right = torch.randn(out, k, generator=generator), torch.randn(k, width, generator=generator)
    return left @ torch.diag(torch.logspace(0, -3, k)) @ right / 10


def moments(width: int, tokens: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(0, 1, width, dtype=torch.float64)
    h = torch.randn(tokens, width, dtype=torch.float64, generator=generator) * scales
    return h.T @ h / tokens


SHAPES = [(40, 24), (24, 40), (32, 32), (1, 9), (9, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 99])
def test_the_plain_cut_is_the_truncated_svd(shape, rank):
    D = matrix(*shape)
    found = extracted(D, rank=rank)
    U, S, Vt = torch.linalg.svd(D.double(), full_matrices=False)
    k = min(rank, *shape)
    torch.testing.assert_close(found.factors.delta(torch.float64), (U[:, :k] * S[:k]) @ Vt[:k], atol=1e-6, rtol=1e-5)
    assert found.lost == pytest.approx(float(S[k:].square().sum()), rel=1e-4, abs=1e-12)
    assert found.energy == pytest.approx(float(S.square().sum()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_cut_in_the_metric_is_the_best_there(shape, rank):
    """Twin: truncate D M^(1/2), then multiply by M^(-1/2)."""
    D, M = matrix(*shape), moments(shape[1])
    found = extracted(D, rank=rank, moments=M)
    values, Q = torch.linalg.eigh(M)
    root, inverse = (Q * values.sqrt()) @ Q.T, (Q / values.sqrt()) @ Q.T
    U, S, Vt = torch.linalg.svd(D.double() @ root, full_matrices=False)
    k = min(rank, *shape)
    best = (U[:, :k] * S[:k]) @ Vt[:k] @ inverse
    torch.testing.assert_close(found.factors.delta(torch.float64), best, atol=1e-5, rtol=1e-4)
    assert found.metric_lost == pytest.approx(float(S[k:].square().sum()), rel=1e-4, abs=1e-9)
    assert found.metric == pytest.approx(float(S.square().sum()))
    plain = extracted(D, rank=rank)
    assert found.metric_lost <= loss_of(D, plain.factors, M)[1] * (1 + 1e-6) and plain.lost <= found.lost * (1 + 1e-6)


def test_a_moment_matrix_without_full_rank_needs_no_inverse():
    D, M = matrix(20, 16), moments(16, tokens=6)
    found = extracted(D, rank=6, moments=M)
    assert found.metric_lost < 1e-9 * found.metric  # six directions are all that the inputs have


@pytest.mark.parametrize("with_moments", [False, True])
def test_large_matrices_by_power_iterations(monkeypatch, with_moments):
    D, M = matrix(90, 70), moments(70) if with_moments else None
    exact = extracted(D, rank=5, moments=M)
    shares = {e: extracted(D, energy=e, moments=M).factors.rank for e in (0.5, 0.9, 0.999, 1.0)}
    monkeypatch.setattr(spectrum, "_WHOLE", 16)
    block = extracted(D, rank=5, moments=M)
    torch.testing.assert_close(block.factors.delta(), exact.factors.delta(), atol=2e-4, rtol=1e-2)
    assert block.lost == pytest.approx(loss_of(D, block.factors)[0]) and block.lost <= exact.lost * (1 + 1e-3)
    assert {e: extracted(D, energy=e, moments=M).factors.rank for e in shares} == shares


def test_all_the_energy_is_the_rank():
    D = matrix(30, 20)[:, :4] @ torch.ones(4, 20)
    assert extracted(D, energy=1.0).factors.rank == 1


def level(out: int, width: int) -> torch.Tensor:
    """A matrix whose singular values are the same but for rounding: last bits decide which directions come first."""
    wide = torch.linalg.qr(torch.randn(max(out, width), min(out, width), generator=torch.Generator().manual_seed(4)))[0]
    return wide if out >= width else wide.T.contiguous()


@pytest.mark.parametrize("shape", [(384, 512), (512, 384)])  # sizes at which LAPACK, left to itself, splits its work
@pytest.mark.parametrize("asked", [{"rank": 8}, {"energy": 0.2}, {"rank": 8, "metric": True}])
@pytest.mark.parametrize("whole", [2048, 300])  # decomposed whole, or by power iterations
def test_the_bits_do_not_hang_on_the_number_of_threads(monkeypatch, shape, asked, whole):
    monkeypatch.setattr(spectrum, "_WHOLE", whole)
    options = {k: v for k, v in asked.items() if k != "metric"} | {
        "moments": moments(shape[1]) if "metric" in asked else None
    }
    D, cuts = level(*shape), []
    for count in (1, 2):
        with threads(count):
            cuts.append(extracted(D, **options, seed=3).factors)
    assert torch.equal(cuts[0].A, cuts[1].A) and torch.equal(cuts[0].B, cuts[1].B)
