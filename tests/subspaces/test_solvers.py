"""The cheap solvers against eigh: angles where there is a gap, energies where there is none."""

from __future__ import annotations

import pytest
import torch

from plait.subspaces.solvers import dense_eigenpairs, fixed_signs, orthonormal, orthonormal_rows, top_eigenpairs

D, R = 400, 8


def spectrum(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(D, generator=generator, dtype=torch.float64)
    values = {
        "decaying": torch.logspace(0, -8, D, dtype=torch.float64),
        "slow": torch.linspace(1, 0, D, dtype=torch.float64) ** 2,
        "crowded": 1 - 1e-5 * torch.arange(D, dtype=torch.float64),
        "crowded at the edge": 1 - torch.logspace(-4, 0, D, dtype=torch.float64),
        "gap of 0.002": torch.cat([1 + 0.01 * noise[:R], torch.full((D - R,), 0.998, dtype=torch.float64) - noise[R:]]),
        "flat": torch.ones(D, dtype=torch.float64),
        "equal at the cut": torch.cat([torch.full((20,), 1.0, dtype=torch.float64), 0.5 * noise[20:]]),
        "rank 3": torch.cat(
            [torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.zeros(D - 3, dtype=torch.float64)]
        ),
        "constant": torch.cat([torch.tensor([1.0], dtype=torch.float64), torch.zeros(D - 1, dtype=torch.float64)]),
        "indefinite": torch.linspace(1, -1, D, dtype=torch.float64),
        "zero": torch.zeros(D, dtype=torch.float64),
    }[kind]
    return values.sort(descending=True).values


KINDS = ["decaying", "slow", "crowded", "crowded at the edge", "gap of 0.002", "flat", "equal at the cut"]
KINDS += ["rank 3", "constant", "indefinite", "zero"]


def matrix(values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return (Q * values) @ Q.T


@pytest.mark.parametrize("kind", KINDS)
def test_against_eigh(kind):
    values = spectrum(kind)
    M = torch.stack([matrix(values, s) for s in range(2)])
    start = torch.randn(1, D, R + 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(2, -1, -1)
    found = top_eigenpairs(lambda Y, active: M[list(active)] @ Y, start, R)
    exact = dense_eigenpairs(M, R)
    assert found.converged and exact.converged
    X = found.vectors[..., :R]
    torch.testing.assert_close(X.mT @ X, torch.eye(R, dtype=X.dtype).expand(2, -1, -1), rtol=0, atol=1e-10)
    trace = float(values.abs().sum())
    energies = torch.einsum("tdr,tde,ter->tr", X, M, X)
    assert float((energies.sum(1) - exact.values.sum(1)).abs().max()) <= 1e-5 * trace
    if float(values[R - 1] - values[R]) > 1e-3 * float(values[0]):
        U = exact.vectors
        sines = torch.linalg.matrix_norm(X - U @ (U.mT @ X), 2)
        assert float(sines.max()) < 1e-4


def test_orthonormal_leaves_what_it_is_told_and_survives_dependent_columns():
    generator = torch.Generator().manual_seed(0)
    V = orthonormal(torch.randn(2, 60, 10, generator=generator, dtype=torch.float64))
    inside = V @ torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
    for W in (inside, torch.zeros(2, 60, 4, dtype=torch.float64), torch.ones(2, 60, 4, dtype=torch.float64)):
        Q = orthonormal(W, V)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(4, dtype=Q.dtype).expand(2, -1, -1), rtol=0, atol=1e-10)
        assert float((V.mT @ Q).abs().max()) < 1e-10


def test_signs_and_order_are_fixed():
    columns = torch.tensor([[1.0, 5.0], [-3.0, 1.0], [0.0, 2.0]])
    rows = orthonormal_rows(columns)
    assert float(rows[0, 1]) > 0 and torch.equal(rows, orthonormal_rows(-columns))
    torch.testing.assert_close(rows[0].abs(), columns[:, 0].abs() / columns[:, 0].norm())
    assert torch.equal(fixed_signs(torch.tensor([[-2.0, 2.0]])), torch.tensor([[2.0, -2.0]]))


def test_an_operator_that_has_settled_is_not_applied_again():
    M = torch.stack([matrix(spectrum(kind), 0) for kind in ("slow", "decaying", "gap of 0.002")])
    start = torch.randn(1, D, R + 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(3, -1, -1)
    applied: list[tuple[int, ...]] = []

    def operator(Y, active):
        applied.append(tuple(active))
        return M[list(active)] @ Y

    found = top_eigenpairs(operator, start, R)
    assert found.converged and applied[0] == (0, 1, 2) and applied[-1] == (2,)
    assert [len(a) for a in applied] == sorted((len(a) for a in applied), reverse=True)
    for t in range(3):
        alone = top_eigenpairs(lambda Y, _, t=t: M[t] @ Y, start[:1], R)
        torch.testing.assert_close(found.values[t, :R], alone.values[0, :R], rtol=1e-8, atol=1e-8)
        x, y = found.vectors[t, :, :R], alone.vectors[0, :, :R]
        assert float(torch.linalg.matrix_norm(x - y @ (y.T @ x), 2)) < 1e-4
