"""Shortcuts of the spectral methods: as exact as what they stand for, and left where they would not be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.reference import merging as twin

from plait.merging import merge_methods
from plait.merging.entries.quantile import smallest_kept
from plait.merging.factors import PartingError
from plait.merging.inputs import MergeInputs
from plait.merging.spectra import basis, small_svd, sum_svd
from plait.merging.spectra.basis import orthonormal, principal
from plait.merging.spectra.small_svd import (
    gram_of,
    seen_from,
    significant_svd,
    symmetric_product,
    thin_svd,
    triangular_product,
)
from plait.merging.spectra.sum_svd import svd_of_sum


def with_condition(n: int, m: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A float64 matrix whose singular values fall evenly, on a logarithmic scale, from 1 to 1 / condition."""
    g = torch.Generator().manual_seed(seed)
    k = min(n, m)
    U = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    return (U * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)) @ V.T


def in_single_precision(M: torch.Tensor) -> tuple[basis.Basis, torch.Tensor]:
    """Householder's QR in the dtype of M."""
    Q, T = torch.linalg.qr(M)
    return basis.Basis(Q, torch.eye(Q.shape[1], dtype=torch.float64)), T.double()


def by_gram(M: torch.Tensor) -> bool:
    return basis._by_gram(M) is not None


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0, 500.0])
def test_a_basis_by_gram_is_no_worse_than_householders(condition):
    M = with_condition(300, 24, condition).float()
    assert by_gram(M)
    exact, R = torch.linalg.qr(M.double())
    truth = exact @ torch.linalg.svd(R)[0]  # the singular vectors: what the spectral methods make of the basis

    def error(found, T):
        lifted = found.times(torch.linalg.svd(T)[0]).double()
        return float((lifted @ lifted.T - truth @ truth.T).norm())  # the same span, whatever the signs

    found, T = orthonormal(M)
    assert error(found, T) <= 1.5 * error(*in_single_precision(M)) + 1e-6
    Q = found.columns().double()
    assert float((Q.T @ Q - torch.eye(24)).norm()) <= 1e-6 * condition + 1e-5
    assert float((found.times(T).double() - M).norm()) <= 1e-6


@pytest.mark.parametrize("made", [orthonormal, basis._by_householder])
def test_a_basis_multiplies_from_both_sides(made):
    M = with_condition(40, 6, 3.0)
    found, T = made(M)
    X, U = torch.randn(6, 4, dtype=torch.float64), torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    Q = found.columns()
    assert found.width == 6
    torch.testing.assert_close(Q @ T, M)
    torch.testing.assert_close(found.times(X), Q @ X)
    torch.testing.assert_close(found.rows(X.T), X.T @ Q.T)
    torch.testing.assert_close(found.turned(U).columns(), Q @ U)


@pytest.mark.parametrize("condition", [1.5, 100.0, 800.0, 1e5])
def test_a_principal_basis_is_that_of_the_svd(condition):
    """By eigenvectors of the Gram matrix, and where those are not to be trusted by an SVD."""
    M = with_condition(300, 24, condition).float()
    assert (basis._by_eigenvectors(M) is None) == (condition > 1e3)
    found, T = principal(M)
    _, S, Vt = torch.linalg.svd(M.double(), full_matrices=False)
    # Rows of T are S V^T up to signs: entries smaller than what float32 rounds in M tell nothing.
    signs = (T @ Vt.mT).diagonal().sign()
    torch.testing.assert_close(signs[:, None] * T, S[:, None] * Vt, atol=1e-9, rtol=0)
    Q = found.columns().double()
    assert float((Q.T @ Q - torch.eye(24)).norm()) <= 1e-6 * min(condition, 1e3) + 1e-5
    assert float((found.times(T).double() - M).norm()) <= 1e-6


@pytest.mark.parametrize("shape", [(50, 8), (6, 8), (8, 8)])
@pytest.mark.parametrize("kind", ["zero", "dependent", "a zero column"])
def test_a_principal_basis_of_degenerate_columns(shape, kind):
    M = with_condition(*shape, 2.0).float()
    M = {"zero": M * 0, "dependent": M[:, :1].expand(shape), "a zero column": M * torch.tensor([0.0] + [1.0] * 7)}[kind]
    found, T = principal(M)
    k = min(shape)
    assert found.width == k and T.shape == (k, 8)
    torch.testing.assert_close(found.times(T), M, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.columns().T @ found.columns(), torch.eye(k), atol=1e-5, rtol=0)
    gram = T @ T.mT
    assert float((gram - gram.diagonal().diag()).norm()) <= 1e-12 * max(1.0, float(gram.norm()))
    assert bool((gram.diagonal().diff() <= 1e-12).all())
    stack = torch.stack([M, with_condition(*shape, 2.0).float()])
    if shape[0] > shape[1]:
        with pytest.raises(PartingError):
            principal(stack)
    else:  # in the width there is nothing to fall back from
        both, coordinates = principal(stack)
        torch.testing.assert_close(coordinates[0].abs(), T.abs(), atol=1e-7, rtol=0)
        torch.testing.assert_close(both.times(coordinates), stack, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1e-12, 1.0), (1.0, 1e8), (1e-15, 1e10)])
def test_columns_of_any_size_are_alike(sizes):
    M = with_condition(50, 8, 5.0).float() * torch.tensor([*sizes] * 4)
    assert by_gram(M)
    found, T = orthonormal(M)
    assert float((found.times(T) / M - 1).abs().median()) < 1e-6


@pytest.mark.parametrize(
    "M",
    [
        with_condition(50, 8, 1e5).float(),
        torch.ones(50, 8),
        torch.zeros(50, 8),
        with_condition(50, 8, 2.0).float() * torch.tensor([1.0] * 7 + [0.0]),
        with_condition(6, 8, 2.0).float(),
        torch.full((50, 8), 1e200, dtype=torch.float64),
        torch.zeros(50, 0),
    ],
    ids=["ill", "dependent", "zero", "a zero column", "wide", "huge", "none"],
)
def test_a_basis_falls_back_to_householder(M):
    assert not by_gram(M)
    found, T = orthonormal(M)
    k = min(M.shape)
    assert T.shape == (k, M.shape[1]) and found.width == k and T.dtype == torch.float64
    Q = found.columns()
    torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=M.dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close((Q.double() @ T).to(M.dtype), M, atol=1e-5 * float(M.abs().sum()), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (20, 8), (8, 20), (1, 5), (5, 1), (1, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("condition", [1.5, 1e3, 1e7])
def test_thin_svd_is_the_svd(shape, condition):
    M = with_condition(*shape, condition) if min(shape) else torch.zeros(shape, dtype=torch.float64)
    U, S, Vt = thin_svd(M)
    k = min(shape)
    assert U.shape == (shape[0], k) and Vt.shape == (k, shape[1])
    torch.testing.assert_close(U * S @ Vt, M, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(S, torch.linalg.svdvals(M), atol=1e-14, rtol=1e-8)
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(k, dtype=torch.float64), atol=1e-8, rtol=0)
    assert bool((S.diff() <= 0).all())


def test_singular_values_that_are_zero_or_noise_come_from_lapack():
    for M in (torch.ones(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64), with_condition(6, 6, 1e6)):
        for found, wanted in zip(thin_svd(M), torch.linalg.svd(M, full_matrices=False), strict=True):
            assert torch.equal(found, wanted)
    assert 1 / math.sqrt(small_svd._TRUSTED) == pytest.approx(1e4)


@pytest.mark.parametrize("shape", [(300, 24), (24, 300), (300, 300), (1, 5)])
@pytest.mark.parametrize("condition", [2.0, 1e3, 1e5, 9e5])
def test_a_polar_factor_by_gram_is_that_of_lapack(shape, condition):
    M = with_condition(*shape, condition)
    U, S, Vt = significant_svd(M, 1e-6)
    left, values, right = torch.linalg.svd(M, full_matrices=False)
    k, kappa = min(shape), float(values[0] / values[-1])
    assert len(S) == k and bool((S.diff() <= 0).all())
    lost = max(1e-9, 1e-32 * kappa**4 * k)
    torch.testing.assert_close(S, values, atol=1e-16 * kappa * k + 1e-15, rtol=1e-8)
    assert float((U @ Vt - left @ right).abs().max()) < lost
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=torch.float64), atol=lost, rtol=0)
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(k, dtype=torch.float64), atol=lost, rtol=0)
    assert float((U * S @ Vt - M).norm()) < max(1e-9, 1e-15 * kappa)


def test_a_polar_factor_leaves_noise_out():
    """Rank 5 of 40, with noise as float32 leaves it: LAPACK's factor on the span of what is significant, and none of zero."""
    M = (with_condition(40, 5, 100.0) @ with_condition(5, 60, 3.0)).float().double()
    U, S, Vt = significant_svd(M, 1e-6)
    left, _, right = torch.linalg.svd(M, full_matrices=False)
    assert len(S) == 5 and float((U @ Vt - left[:, :5] @ right[:5]).abs().max()) < 1e-9
    assert significant_svd(M * 0, 1e-6)[1].numel() == 0
    with pytest.raises(PartingError):
        significant_svd(torch.stack([M, M * 0]), 1e-6)
    finer = with_condition(40, 20, 1e11)  # smaller values than squares tell
    assert len(significant_svd(finer, 1e-12)[1]) == 20
    with pytest.raises(PartingError):
        significant_svd(torch.stack([finer, finer]), 1e-12)


def test_infinity_raises():
    with pytest.raises(torch.linalg.LinAlgError):
        thin_svd(torch.full((4, 4), torch.inf, dtype=torch.float64))


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_smallest_kept(density):
    part = torch.randn(13, 7, generator=torch.Generator().manual_seed(1))
    before, bound = part.clone(), smallest_kept(part, density)
    assert int((part.abs() >= bound).sum()) == math.ceil(density * part.numel()) and torch.equal(part, before)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "wudi"])
@pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5])
def test_copies_of_one_a_that_moved_a_little_are_told_apart(method, apart):
    """Against dense float64 twins; a QR in float32 lost 6e-5, 9e-4 and 1.2e-2 here."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(4, 40, generator=g, dtype=torch.float64)
    A = [(first + apart * torch.randn(4, 40, generator=g, dtype=torch.float64)).float() for _ in range(3)]
    B = [torch.randn(30, 4, generator=g) for _ in range(3)]
    deltas = [(b.double() @ a.double()).numpy() for a, b in zip(A, B, strict=True)]
    wanted = torch.from_numpy(getattr(twin, method)(deltas, [1.0, 1.0, 1.0]))
    x = MergeInputs("m", ("a", "b", "c"), (1.0, 1.0, 1.0), tuple(A), tuple(B))
    merged = merge_methods()[method].function(x).delta(torch.float64)
    assert float((merged - wanted).norm()) < 2e-6 * float(wanted.norm())


@pytest.mark.parametrize("shape", [(400, 300), (2, 300, 257)])
def test_a_gram_matrix_in_blocks_is_symmetric_and_the_whole_one(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    gram, whole = gram_of(M), M.double().mT @ M.double()
    assert torch.equal(gram, gram.mT)
    assert torch.allclose(gram, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


@pytest.mark.parametrize("shape", [(300, 300), (2, 257, 257), (40, 40)])
def test_products_of_triangles_in_blocks(shape):
    g = torch.Generator().manual_seed(6)
    L, X = torch.randn(*shape, generator=g).double().tril(), torch.randn(*shape, generator=g).double()
    gram = gram_of(X)
    torch.testing.assert_close(triangular_product(L, X), L @ X, rtol=0, atol=1e-12)
    product = seen_from(L, gram)
    torch.testing.assert_close(product, L.mT @ gram @ L, rtol=0, atol=1e-12 * float(product.abs().max()))
    torch.testing.assert_close(symmetric_product(gram, gram), gram @ gram, rtol=1e-12, atol=1e-9)


def tasks(n: int, r: int, weights: tuple[float, ...], seed: int = 0) -> MergeInputs:
    """Random factors of (n, n + 3) for as many tasks as there are weights."""
    g = torch.Generator().manual_seed(seed)
    A = tuple(torch.randn(r, n + 3, generator=g) for _ in weights)
    B = tuple(torch.randn(n, r, generator=g) for _ in weights)
    return MergeInputs("m", tuple(map(str, range(len(weights)))), weights, A, B)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -2.0, 1.0)])
def test_the_svd_of_a_sum_by_gram_matrices(weights):
    x = tasks(60, 4, weights)
    assert sum_svd._by_gram(x) is not None
    U, S, V = svd_of_sum(x)
    whole = sum(w * b.double() @ a.double() for w, a, b in zip(weights, x.A, x.B, strict=True))
    assert torch.allclose(S, torch.linalg.svdvals(whole)[: len(S)], rtol=1e-6)
    U, V = U.columns().double(), V.columns().double()
    assert float((U * S @ V.T - whole).norm() / whole.norm()) < 1e-5
    for Q in (U, V):
        assert float((Q.T @ Q - torch.eye(len(S), dtype=torch.float64)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "weights, shared, r",
    [((1.0, 0.0, 1.0), False, 4), ((1.0, 1.0, 1.0), True, 4), ((1.0, 1.0, 1.0), False, 25)],
    ids=["no weight", "one A", "more columns than rows"],
)
def test_the_svd_of_a_sum_falls_back_where_it_is_not_to_be_trusted(weights, shared, r):
    x = tasks(60, r, weights)
    x = replace(x, A=(x.A[0],) * 3) if shared else x
    assert sum_svd._by_gram(x) is None
    U, S, V = svd_of_sum(x)
    whole = sum(w * b.double() @ a.double() for w, a, b in zip(weights, x.A, x.B, strict=True))
    assert float((U.columns().double() * S @ V.columns().double().T - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("method", ["tsv", "iso_c", "core_space"])
@pytest.mark.parametrize("shape", [(24, 24), (24, 23), (20, 40), (40, 20), (16, 12)], ids=str)
def test_ranks_that_add_up_to_the_width_or_more(method, shape):
    """24 in all, in one side's width or in both: against dense float64 twins, no basis is looked for where there is nothing to find."""
    g = torch.Generator().manual_seed(3)
    A = tuple(torch.randn(8, shape[1], generator=g) for _ in range(3))
    B = tuple(torch.randn(shape[0], 8, generator=g) for _ in range(3))
    weights = (1.0, 0.5, 2.0)
    x = MergeInputs("m", ("a", "b", "c"), weights, A, B)
    wide_A, wide_B = ([part.double().numpy() for part in parts] for parts in (A, B))
    if method == "core_space":
        wanted = twin.core_space(wide_A, wide_B, weights, 0.3)
    else:
        wanted = getattr(twin, method)([b @ a for a, b in zip(wide_A, wide_B, strict=True)], weights)
    merged = merge_methods()[method].function(x).delta(torch.float64)
    assert float((merged - torch.from_numpy(wanted)).norm()) < 2e-6 * float(np.linalg.norm(wanted))
    for side, factors in ((0, torch.cat(B, dim=1)), (1, torch.cat(A).mT)):
        assert (orthonormal(factors)[0].tall is None) == (shape[side] <= 24)
