"""The subspaces themselves: theorems, ties, laws every method obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plait.errors import InputError, UsageError
from plait.statistics.moments import ModuleInfo, Moments, Statistics
from plait.statistics.sketch import compress
from plait.subspaces import compute_subspaces, find_subspace_method, subspace_methods
from tests.subspaces.pools import base_weight, features, moments_of, normalised, others, pool

METHODS = list(subspace_methods())
RANDOM = ["gaussian", "kaiming", "orthonormal", "orthonormal_disjoint", "orthonormal_shared"]


def energy(A, m) -> float:
    return float(torch.trace(A @ m @ A.T))


def objective(A, own, R) -> float:
    return float(torch.trace(torch.linalg.solve(A @ R @ A.T, A @ own @ A.T)))


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_laws(method):
    given = pool()
    found = compute_subspaces(method, given, rank=4, seed=3, weights=base_weight)
    again = compute_subspaces(method, dict(reversed(given.items())), rank=4, seed=3, weights=base_weight)
    assert list(found) == list(given) and list(found["t0"]) == ["a.q", "a.v"]
    for task, modules in found.items():
        for module, subspace in modules.items():
            A = subspace.A
            assert A.dtype == torch.float32 and A.shape == (4, 32) and subspace.energies.shape == (4,)
            assert torch.equal(A, again[task][module].A) and torch.equal(A, subspace.A)
            if method not in ("kaiming", "gaussian"):
                torch.testing.assert_close(subspace.basis @ subspace.basis.T, torch.eye(4), rtol=0, atol=1e-5)
                torch.testing.assert_close(A.norm(dim=1), torch.full((4,), subspace.row_norm), rtol=1e-5, atol=0)
            if method not in RANDOM and method != "osrm_released":
                largest = subspace.basis.gather(1, subspace.basis.abs().argmax(1, keepdim=True))
                assert bool((largest > 0).all())
    scaled = compute_subspaces(method, given, rank=4, seed=3, row_norm=2.5, weights=base_weight)
    torch.testing.assert_close(scaled["t1"]["a.v"].A.norm(dim=1), torch.full((4,), 2.5))
    assert find_subspace_method(method).per_module == (not torch.equal(found["t0"]["a.q"].A, found["t0"]["a.v"].A))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in RANDOM])
def test_how_much_data_a_task_has_does_not_matter(method):
    """Moments are trace-normalised: a task counted ten times weighs the same."""
    given = pool()
    many = dict(given)
    for _ in range(3):
        many["t1"] = Statistics(
            {"a.q": many["t1"].sites["a.q"].merge(many["t1"].sites["a.q"])}, given["t1"].modules, given["t1"].provenance
        )
    a, b = (compute_subspaces(method, s, rank=3, weights=base_weight)["t0"]["a.q"].basis for s in (given, many))
    torch.testing.assert_close(a @ a.T @ a, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.T @ a, b.T @ b, rtol=1e-4, atol=1e-4)


def test_default_row_norms():
    norms = {
        m: compute_subspaces(m, pool(), rank=4, weights=base_weight)["t0"]["a.q"].A.norm(dim=1).mean() for m in METHODS
    }
    neighbours = ("sc_lora", "inflora", "corda")
    for unit in ("osrm", "osrm_released", *neighbours, "orthonormal", "orthonormal_disjoint", "orthonormal_shared"):
        assert float(norms[unit]) == pytest.approx(1.0, rel=1e-5)
    for gaussian in ("contrastive", "contrastive_permuted"):
        assert float(norms[gaussian]) == pytest.approx(32**0.5 / 4, rel=1e-5)
    assert float(norms["gaussian"]) == pytest.approx(32**0.5 / 4, rel=0.25)
    assert float(norms["kaiming"]) == pytest.approx(0.577, rel=0.15)


def test_what_is_shared_and_what_is_drawn():
    found = {m: compute_subspaces(m, pool(), rank=4, seed=1) for m in RANDOM}
    for method, of in found.items():
        same = torch.equal(of["t0"]["a.q"].A, of["t1"]["a.q"].A)
        assert same == (method == "orthonormal_shared")
        assert not torch.equal(of["t0"]["a.q"].A, compute_subspaces(method, pool(), rank=4, seed=2)["t0"]["a.q"].A)
        alone = compute_subspaces(method, pool(), rank=4, seed=1, tasks=["t2"])
        assert torch.equal(alone["t2"]["a.v"].A, of["t2"]["a.v"].A)


def scarce(own: int) -> dict[str, Statistics]:
    """Tasks of 6 inputs each, the first of `own`."""
    return {
        task: replace(s, sites={"a.q": moments_of(features(i, 6 if i else own, 32))})
        for i, (task, s) in enumerate(pool().items())
    }


# --- osrm -------------------------------------------------------------------------------------------------------------


def test_osrm_has_the_least_other_energy():
    given = pool(n=500)
    m = normalised(given)
    for task, modules in compute_subspaces("osrm", given, rank=4).items():
        A = modules["a.q"].A.double()
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-6)
        mine = energy(A, others(m, task))
        values = torch.linalg.eigvalsh(others(m, task))
        assert mine == pytest.approx(float(values[:4].sum()), rel=1e-4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            B = torch.linalg.qr(torch.randn(32, 4, generator=generator, dtype=torch.float64)).Q.T
            assert mine < energy(B, others(m, task))


@pytest.mark.parametrize("own", [20, 300])
def test_osrm_breaks_ties_by_own_energy(own):
    """Three others of 6 inputs leave a null space of 32 - 18: the best four directions for the task inside it."""
    given = {
        t: Statistics({"a.q": moments_of(features(i, own if i == 0 else 6, 32))}, s.modules, s.provenance)
        for i, (t, s) in enumerate(pool().items())
    }
    m = normalised(given)
    subspace = compute_subspaces("osrm", given, rank=4, tasks=["t0"])["t0"]["a.q"]
    A = subspace.A.double()
    assert energy(A, others(m, "t0")) < 1e-10 and subspace.record["tied"] == 14
    assert subspace.record["solver"] == "null space"
    _, vectors = torch.linalg.eigh(others(m, "t0"))
    Z = vectors[:, :14]
    best = torch.linalg.eigvalsh(Z.T @ m["t0"] @ Z)[-4:].sum()
    assert energy(A, m["t0"]) == pytest.approx(float(best), rel=1e-5)


def test_osrm_dense_ties_agree_with_factor_ties():
    given = {
        t: Statistics({"a.q": moments_of(features(i, 6, 32))}, s.modules, s.provenance)
        for i, (t, s) in enumerate(pool().items())
    }
    dense = {
        t: Statistics({"a.q": Moments(x.count, x.total, x.dense())}, s.modules, s.provenance)
        for t, s in given.items() for x in [s.sites["a.q"]]
    }  # fmt: skip
    a, b = (compute_subspaces("osrm", s, rank=4)["t1"]["a.q"] for s in (given, dense))
    assert a.record["solver"] == "null space" and b.record["solver"] == "eigh" and b.record["tied"] == 14
    torch.testing.assert_close(a.basis, b.basis, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["factor", "dense"])
def test_osrm_completes_what_the_tied_space_lacks(form):
    """Own inputs with two directions beyond the others' span: those, then the next smallest eigenvectors they reach."""
    H = {t: features(i, 7, 32) for i, t in enumerate(pool())}
    H["t0"] = torch.cat([H["t1"], H["t2"], features(0, 2, 32)])
    given = {t: Statistics({"a.q": moments_of(H[t])}, s.modules, s.provenance) for t, s in pool().items()}
    if form == "dense":
        given = {
            t: Statistics({"a.q": Moments(x.count, x.total, x.dense())}, s.modules, s.provenance)
            for t, s in given.items() for x in [s.sites["a.q"]]
        }  # fmt: skip
    m = normalised(given)
    subspace = compute_subspaces("osrm", given, rank=4, tasks=["t0"])["t0"]["a.q"]
    A = subspace.A.double()
    torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-6)
    values, vectors = torch.linalg.eigh(others(m, "t0"))
    assert int((values < 1e-12).sum()) == 11 and subspace.record["tied"] == 11 and subspace.record["completed"] == 2
    Z = vectors[:, :11]
    inside = torch.linalg.eigvalsh(Z.T @ m["t0"] @ Z)
    assert int((inside > 1e-12).sum()) == 2  # all the energy it has there is taken
    assert energy(A[:2], m["t0"]) == pytest.approx(float(inside.sum()), rel=1e-5)
    torch.testing.assert_close((A[2:] @ vectors[:, 11:13]).abs(), torch.eye(2, dtype=A.dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(subspace.energies[2:], values[11:13], rtol=1e-5, atol=0)


def test_osrm_passes_over_directions_the_own_inputs_never_reach():
    """The smallest eigenvector above the tied space has no own energy: the one after it is taken."""
    weights = torch.tensor([0.0, 0.0, 0.0, 1e-3, 1e-2, 1.0], dtype=torch.float64)
    own = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    modules = {"a.q": ModuleInfo("a.q", (6, 6), 1.0)}
    given = {
        t: Statistics({"a.q": Moments(9, w, torch.diag(w))}, modules, {"base": "b", "pool": "token"})
        for t, w in {"own": own, "other": weights}.items()
    }
    found = compute_subspaces("osrm", given, rank=2, tasks=["own"])["own"]["a.q"]
    torch.testing.assert_close(found.A, torch.eye(6)[[1, 4]])
    assert (found.record["tied"], found.record["completed"]) == (3, 1)


def test_an_arbitrary_basis_is_an_error():
    given = scarce(2)
    with pytest.raises(InputError, match="'t0' span fewer than 4 directions"):
        compute_subspaces("osrm", given, rank=4)
    with pytest.raises(InputError, match="span fewer than 4 directions"):
        compute_subspaces("contrastive", given, rank=4)
    constant = torch.ones(100, 1, dtype=torch.float64) * features(0, 1, 32)
    same = {**pool(), "t0": Statistics({"a.q": moments_of(constant)}, pool()["t0"].modules, pool()["t0"].provenance)}
    with pytest.raises(InputError, match="span fewer"):
        compute_subspaces("contrastive", same, rank=4)
    assert compute_subspaces("osrm", same, rank=4)["t0"]["a.q"].A.shape == (4, 32)


def test_osrm_released_is_the_authors_algebra():
    given = pool(dim=24)
    for task, modules in compute_subspaces("osrm_released", given, rank=4).items():
        H = torch.stack(
            [s.sites["a.q"].padded_total / s.sites["a.q"].padded_count for t, s in given.items() if t != task]
        )
        _, _, Vt = torch.linalg.svd(H, full_matrices=True)  # their lines: V^T of the full SVD, its last r rows
        theirs, A = Vt[-4:], modules["a.q"].A.double()
        torch.testing.assert_close(A.T @ A, theirs.T @ theirs, rtol=0, atol=1e-6)
        assert float((H @ A.T).abs().max()) < 1e-6
    bare = Statistics({"a.q": Moments(9, torch.zeros(24), torch.eye(24))}, given["t0"].modules, given["t0"].provenance)
    with pytest.raises(InputError, match="no mean over padded positions"):
        compute_subspaces("osrm_released", {**given, "t1": bare}, rank=4)


# --- contrastive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1e-3, 0.1])
@pytest.mark.parametrize("dim", [32, 300])
def test_contrastive_attains_the_bound(rho, dim):
    given = pool(n=3 * dim, dim=dim)
    m = normalised(given)
    for task, modules in compute_subspaces("contrastive", given, rank=4, options={"rho": rho}).items():
        R = others(m, task) + rho / dim * torch.eye(dim)
        L = torch.linalg.cholesky(R)
        inverse = torch.linalg.inv(L)
        bound = float(torch.linalg.eigvalsh(inverse @ m[task] @ inverse.T)[-4:].sum())
        subspace = modules["a.q"]
        A = subspace.A.double()
        assert objective(A, m[task], R) == pytest.approx(bound, rel=1e-5)
        assert float(subspace.energies.sum()) == pytest.approx(bound, rel=1e-5)
        turned = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ A
        assert objective(turned, m[task], R) == pytest.approx(bound, rel=1e-5)
        assert subspace.record["solver"] == ("eigh" if dim == 32 else "block lanczos")


def test_contrastive_permuted_is_contrastive_of_the_next_task():
    given = pool()
    right, wrong = (compute_subspaces(m, given, rank=3) for m in ("contrastive", "contrastive_permuted"))
    for task, other in zip(given, ["t1", "t2", "t3", "t0"], strict=True):
        assert torch.equal(wrong[task]["a.q"].A, right[other]["a.q"].A)
        assert wrong[task]["a.q"].record["statistics_of"] == other


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_sc_lora_takes_the_top_of_the_difference(beta):
    given = pool(n=900, dim=300)
    m = normalised(given)
    A = compute_subspaces("sc_lora", given, rank=4, options={"beta": beta})["t2"]["a.q"].A.double()
    difference = (1 - beta) * m["t2"] - beta * others(m, "t2")
    assert energy(A, difference) == pytest.approx(float(torch.linalg.eigvalsh(difference)[-4:].sum()), rel=1e-6)


@pytest.mark.parametrize("method", ["contrastive", "osrm", "sc_lora"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_background_is_mixed_by_its_weight(method, weight):
    """The shared pencil with a background gives what the mixture of the definition gives."""
    given, background = pool(), pool(5)["t4"]
    m = normalised(given)
    b = background.sites["a.q"].normalised()
    found = compute_subspaces(method, given, rank=4, background=background, background_weight=weight)
    for task, modules in found.items():
        mixed = (1 - weight) * others(m, task) + weight * b
        A = modules["a.q"].A.double()
        if method == "contrastive":
            R = mixed + 0.001 / 32 * torch.eye(32)
            inverse = torch.linalg.inv(torch.linalg.cholesky(R))
            bound = torch.linalg.eigvalsh(inverse @ m[task] @ inverse.T)[-4:].sum()
            assert objective(A, m[task], R) == pytest.approx(float(bound), rel=1e-5)
        elif method == "osrm":
            assert energy(A, mixed) == pytest.approx(float(torch.linalg.eigvalsh(mixed)[:4].sum()), rel=1e-4)
        else:
            difference = 0.5 * m[task] - 0.5 * mixed
            assert energy(A, difference) == pytest.approx(float(torch.linalg.eigvalsh(difference)[-4:].sum()), rel=1e-5)
    alone = compute_subspaces(
        method, {"t0": given["t0"]}, rank=4, background=[background, given["t1"]], background_weight=1.0
    )
    assert alone["t0"]["a.v"].A.shape == (4, 32)


def test_one_large_task_among_small_ones():
    """Others are a sum over the others: nothing is subtracted, so a task 1e6 times larger costs no digits."""
    given = pool()
    big = given["t3"].sites["a.q"]
    huge = Moments(big.count, big.total * 1e3, big.second * 1e6)
    scaled = {**given, "t3": Statistics({"a.q": huge}, given["t3"].modules, given["t3"].provenance)}
    for method in ("osrm", "contrastive"):
        a, b = (compute_subspaces(method, s, rank=4)["t3"]["a.q"].basis for s in (given, scaled))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sketches_serve_as_statistics():
    given = pool(n=900, dim=64)
    m = normalised(given)
    small = {t: Statistics({"a.q": compress(s.sites["a.q"], 8)}, s.modules, s.provenance) for t, s in given.items()}
    R = others(m, "t0") + 0.1 / 64 * torch.eye(64)
    exact, sketched = (compute_subspaces("contrastive", s, rank=4)["t0"]["a.q"].A.double() for s in (given, small))
    assert objective(sketched, m["t0"], R) > 0.98 * objective(exact, m["t0"], R)


# --- bad calls --------------------------------------------------------------------------------------------------------


def test_bad_calls_are_named():
    given = pool()
    for call, message in (
        ({"method": "osrn"}, "did you mean 'osrm'"),
        ({"options": {"roh": 1.0}}, "did you mean 'rho'"),
        ({"options": {"rho": 0.0}}, "rho is 0.0"),
        ({"rank": 0}, "rank 0"),
        ({"row_norm": float("nan")}, "row norm"),
        ({"tasks": ["tx"]}, "no statistics of task 'tx'"),
        ({"statistics": {"t0": given["t0"]}}, "needs other tasks' statistics"),
        ({"background": given["t0"], "background_weight": 2.0}, "background weight 2.0"),
    ):
        arguments = {"method": "contrastive", "statistics": given, "rank": 2, **call}
        with pytest.raises(UsageError, match=message):
            compute_subspaces(arguments.pop("method"), arguments.pop("statistics"), **arguments)
    with pytest.raises(InputError, match="rank 40 at a module of width 32"):
        compute_subspaces("osrm", given, rank=40)
    other = Statistics(given["t1"].sites, {"a.q": ModuleInfo("a.q", (32, 32), 1.0)}, given["t1"].provenance)
    with pytest.raises(InputError, match=r"'a\.v' is in only one"):
        compute_subspaces("osrm", {**given, "t1": other})
    assert find_subspace_method("sc_lora").options["beta"].default == 0.5
