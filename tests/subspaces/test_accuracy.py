"""Whole methods against full decompositions in float64: angles where there is a gap, energies everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.statistics.moments import ModuleInfo, Statistics
from plait.subspaces import compute_subspaces
from tests.subspaces.pools import features, moments_of, normalised, others

D, R = 300, 4
KINDS = ["plain", "flat", "steep", "rank 120", "constant", "dead half"]


def inputs(kind: str, task: int) -> Tensor:
    """More inputs than D, so that moments are dense; or few, so that they are factors."""
    if kind.endswith("inputs"):
        return features(task, int(kind.split(maxsplit=1)[0]), D)
    H = features(task, 3 * D, D)
    generator = torch.Generator().manual_seed(task)
    if kind == "flat":
        return torch.randn(40 * D, D, generator=generator, dtype=torch.float64)
    if kind == "steep":
        return H * torch.logspace(0, -3, D, dtype=torch.float64)
    if kind == "rank 120":  # all tasks live in one space that is not the whole
        shared = torch.randn(120, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return H[:, :120] @ shared
    if kind == "constant":  # a third of the features says the same of every token
        return torch.cat([torch.ones(len(H), D // 3, dtype=torch.float64) * (3 + task), H[:, D // 3 :]], 1)
    return (
        torch.cat([H[:, : D // 2], torch.zeros(len(H), D // 2, dtype=torch.float64)], 1) if kind == "dead half" else H
    )


def statistics(kind: str) -> dict[str, Statistics]:
    found = {}
    for i in range(3):
        H = inputs(kind, i)
        modules = {"a.q": ModuleInfo("a.q", (D, D), 1.0)}
        found[f"t{i}"] = Statistics({"a.q": moments_of(H)}, modules, {"base": "b", "pool": "token"})
    return found


def sine(A: Tensor, basis: Tensor) -> float:
    """Of the largest angle between the spans of rows and of orthonormal columns."""
    rows = torch.linalg.qr(A.double().T).Q
    return float(torch.linalg.matrix_norm(rows - basis @ (basis.T @ rows), 2))


@pytest.mark.parametrize("kind", [*KINDS, "100 inputs", "200 inputs"])
@pytest.mark.parametrize("rho", [1e-3, 0.1])
def test_contrastive(kind, rho):
    """With few inputs the largest l are a thousand and more, and mu = l / (T - 1 + l) has no gaps to see."""
    given = statistics(kind)
    m = normalised(given)
    for task, modules in compute_subspaces("contrastive", given, rank=R, options={"rho": rho}).items():
        A = modules["a.q"].A.double()
        assert modules["a.q"].record["solver"] == ("thin" if kind == "100 inputs" else "block lanczos")
        ridged = others(m, task) + rho / D * torch.eye(D, dtype=torch.float64)
        inverse = torch.linalg.inv(torch.linalg.cholesky(ridged))
        values, vectors = torch.linalg.eigh(inverse @ m[task] @ inverse.T)
        wanted = torch.linalg.qr(inverse.T @ vectors[:, -R:]).Q
        attained = float(torch.trace(torch.linalg.solve(A @ ridged @ A.T, A @ m[task] @ A.T)))
        assert abs(attained - float(values[-R:].sum())) <= 1e-5 * float(values.sum())
        if float(values[-R] - values[-R - 1]) > 1e-3 * float(values[-1]):
            assert sine(A, wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_osrm(kind):
    given = statistics(kind)
    m = normalised(given)
    for task, modules in compute_subspaces("osrm", given, rank=R).items():
        A = modules["a.q"].A.double()
        values, vectors = torch.linalg.eigh(others(m, task))
        empty = int((values < 1e-13).sum())
        assert empty == {"rank 120": 180, "constant": D // 3 - 1, "dead half": D // 2}.get(kind, 0)
        # Where nobody's inputs reach the empty directions, the smallest of the others that the task's own reach.
        span, kept = vectors[:, empty : empty + R], values[empty : empty + R + 1]
        assert abs(float(torch.trace(A @ others(m, task) @ A.T)) - float(kept[:R].sum())) <= 1e-5
        assert modules["a.q"].record.get("completed", 0) == (R if empty else 0)
        if float(kept[R] - kept[R - 1]) > 1e-3 * float(kept[R]):
            assert sine(A, span) < 1e-4
