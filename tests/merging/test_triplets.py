"""Singular triplets made orthogonal by Gram matrices: what QR and SVDs in the lossless core give, and left where it would not be."""

from __future__ import annotations

import pytest
import torch

from plait.merging.factors import PartingError
from plait.merging.inputs import MergeInputs
from plait.merging.spectra import triplets
from plait.merging.spectra.triplets import orthogonal_triplets


def module(ranks: tuple[int, ...], sizes: tuple[float, ...] = (), *, out: int = 50, width: int = 60, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    sizes = sizes or (1.0,) * len(ranks)
    A = tuple(torch.randn(r, width, generator=g) for r in ranks)
    B = tuple(size * torch.randn(out, r, generator=g) for r, size in zip(ranks, sizes, strict=True))
    return MergeInputs("l.q", tuple("abcdefgh")[: len(ranks)], (1.0,) * len(ranks), A, B)


def merged(x: MergeInputs, most: int | None) -> torch.Tensor:
    """polar(U) diag(S) polar(V)^T, which does not depend on signs."""
    U, S, V = orthogonal_triplets(x, most)
    return (U.columns().double() * torch.cat(S)) @ V.columns().double().T


def vectors(x: MergeInputs, t: int, most: int | None) -> tuple[torch.Tensor, ...]:
    U, S, Vt = torch.linalg.svd(x.B[t].double() @ x.A[t].double(), full_matrices=False)
    k = min(x.ranks[t], most or x.ranks[t])
    return U[:, :k], S[:k], Vt[:k].T


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 0, 5, 3), (1, 8)], ids=str)
@pytest.mark.parametrize("sizes", [(), (1e-4, 1.0, 1e3, 1e-8)], ids=["alike", "of any size"])
@pytest.mark.parametrize("most", [None, 2])
def test_they_are_those_of_the_dense_deltas(ranks, sizes, most):
    x = module(ranks, sizes[: len(ranks)])
    assert triplets._by_gram(x, most) is not None
    U, S, V = (list(part) for part in zip(*(vectors(x, t, most) for t in range(len(ranks))), strict=True))
    left, right = (
        P @ Qt for P, _, Qt in (torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False) for parts in (U, V))
    )
    wanted = (left * torch.cat(S)) @ right.T
    torch.testing.assert_close(merged(x, most), wanted, rtol=0, atol=2e-6 * float(torch.cat(S).max()))
    for found, values in zip(orthogonal_triplets(x, most)[1], S, strict=True):
        torch.testing.assert_close(found, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("most", [None, 2])
def test_both_ways_agree(monkeypatch, most):
    x = module((4, 3, 4))
    usual = merged(x, most)
    monkeypatch.setattr(triplets, "_by_gram", lambda x, most: None)
    torch.testing.assert_close(merged(module((4, 3, 4)), most), usual, rtol=0, atol=1e-5)


def changed(kind: str) -> MergeInputs:
    """Two tasks and another that is degenerate in one way."""
    x = module((3, 3, 3))
    A, B = list(x.A), list(x.B)
    if kind == "a copy":
        A[2] = A[0].clone()
    elif kind == "dependent rows":
        A[2] = A[2][[0, 1, 0]]
    elif kind == "nearly dependent columns":
        B[2] = torch.cat([B[2][:, :2], B[2][:, :1] + 1e-5 * B[2][:, 2:]], dim=1)
    elif kind == "zero":
        B[2] = torch.zeros_like(B[2])
    elif kind == "a zero column":
        B[2] = B[2] * torch.tensor([1.0, 0.0, 1.0])
    return x.with_factors(tuple(A), tuple(B))


@pytest.mark.parametrize("kind", ["a copy", "dependent rows", "nearly dependent columns", "zero", "a zero column"])
@pytest.mark.parametrize("most", [None, 1])
def test_what_is_degenerate_is_left_to_the_core(kind, most):
    x = changed(kind)
    # One triplet of each task does not depend on the others' where all of them together do.
    assert (triplets._by_gram(x, most) is None) == (kind != "a copy" or most is None)
    U, S, V = orthogonal_triplets(x, most)
    for t, values in enumerate(S):
        dense = torch.linalg.svdvals(x.B[t].double() @ x.A[t].double())
        torch.testing.assert_close(values, dense[: len(values)], rtol=1e-6, atol=0)
    assert all(bool(basis.columns().isfinite().all()) for basis in (U, V))


def test_more_columns_than_rows_and_members_of_a_stack():
    assert triplets._by_gram(module((30, 30)), None) is None
    x = changed("zero")
    with pytest.raises(PartingError):
        orthogonal_triplets(MergeInputs(x.module, x.tasks, x.weights, x.A, x.B, members=(x, x)))
