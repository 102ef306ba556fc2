"""Every merging method against its dense float64 twin on 200 random modules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.errors import InputError, RunError, UsageError
from plait.merging import merge_methods
from plait.merging.dense import DenseDelta, Truncated
from plait.merging.entries.random_masks import Place, draw
from plait.merging.inputs import MergeInputs
from plait.merging.methods.pico import mean_norm_factor, shrink_shared_directions
from plait.merging.methods.svc import calibrated
from plait.statistics.fisher import FisherDiagonal
from plait.statistics.moments import Moments
from tests.reference import merging as twin

CASES = 200


def random_module(rng: np.random.Generator, *, tasks: int | None = None, positive: bool = False) -> MergeInputs:
    tasks = tasks or int(rng.integers(1, 5))
    out, width = (int(n) for n in rng.integers(1, 9, 2))
    ranks = rng.integers(1, 4, tasks)
    shared = rng.random() < 0.15  # one A for all tasks
    A = [rng.standard_normal((r, width)) for r in ([ranks[0]] * tasks if shared else ranks)]
    A = [A[0]] * tasks if shared else A
    B = [rng.standard_normal((out, len(a))) * 10.0 ** rng.uniform(-1, 1) for a in A]
    weights = rng.uniform(0.2, 2.0, tasks) if positive or rng.random() < 0.6 else rng.uniform(-1.5, 1.5, tasks)
    weights = np.ones(tasks) if rng.random() < 0.3 else weights
    rows = [rng.standard_normal((width + 3, width)) for _ in range(tasks)]
    moments = tuple(Moments(len(h), torch.tensor(h.sum(0)), torch.tensor(h.T @ h)) for h in rows)
    gradients = [rng.standard_normal((out + 3, out)) for _ in range(tasks)]
    diagonals = [torch.tensor(rng.exponential(1e-4, (out, width))) for _ in range(tasks)]
    return MergeInputs(
        module="layer.q",
        tasks=tuple(f"t{i}" for i in range(tasks)),
        weights=tuple(weights.tolist()),
        A=tuple(torch.tensor(a) for a in A),
        B=tuple(torch.tensor(b) for b in B),
        seed=int(rng.integers(100)),
        moments=moments,
        fisher=tuple(FisherDiagonal.held({"layer.q": d}, 1).modules["layer.q"] for d in diagonals),
        output_gradients=tuple(Moments(len(g), torch.tensor(g.sum(0)), torch.tensor(g.T @ g)) for g in gradients),
    )


def deltas(x: MergeInputs) -> list[np.ndarray]:
    return [(b @ a).numpy() for a, b in zip(x.A, x.B, strict=True)]


def words(x: MergeInputs) -> list[np.ndarray]:
    return [draw(x, t, Place("dense", x.shape), x.shape).astype(np.int64) for t in range(len(x.tasks))]


def seconds(x: MergeInputs) -> list[np.ndarray]:
    return [m.dense().numpy() for m in x.moments]


def mats(x: MergeInputs, solves: int) -> np.ndarray:
    G = [g.dense().numpy() for g in x.output_gradients]
    return twin.mats(deltas(x), [b.numpy() for b in x.B], x.weights, G, seconds(x), 0.9, 1e-6, solves)


def diagonals(x: MergeInputs) -> list[np.ndarray]:
    return [f.rows(0, x.shape[0]).numpy() for f in x.fisher]


def dare(x: MergeInputs, density: float) -> list[np.ndarray]:
    return twin.dropped(deltas(x), words(x), round(density * 65536))


# method -> (options, twin of one module, how the module is drawn)
TWINS = {
    "linear": ({}, lambda x: twin.linear(deltas(x), x.weights), {"positive": True}),
    "task_arithmetic": ({}, lambda x: twin.task_arithmetic(deltas(x), x.weights), {}),
    "cat": ({}, lambda x: twin.task_arithmetic(deltas(x), x.weights), {}),
    "svd": ({"svd_rank": 2}, lambda x: twin.svd(deltas(x), x.weights, 2), {}),
    "ties": ({"density": 0.3, "scope": "module"}, lambda x: twin.ties(deltas(x), x.weights, 0.3), {}),
    "dare_linear": ({"density": 0.7}, lambda x: twin.combination(dare(x, 0.7), x.weights), {}),
    "dare_ties": ({"density": 0.4}, lambda x: twin.elect(dare(x, 0.4), x.weights), {}),
    "della": (
        {"density": 0.5, "epsilon": 0.3},
        lambda x: twin.elect(twin.mag_prune(deltas(x), words(x), 0.5, 0.3), x.weights),
        {},
    ),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1}, lambda x: twin.breadcrumbs(deltas(x), x.weights, 0.6, 0.1), {}),
    "sparse_arithmetic": (
        {"drop": "outliers", "density": 0.6, "gamma": 0.2, "rescale": True, "elect": True, "normalise": True},
        lambda x: twin.sparse_arithmetic(deltas(x), x.weights, 0.6, 0.2),
        {},
    ),
    "sce": ({"density": 0.3}, lambda x: twin.sce(deltas(x), x.weights, 0.3), {}),
    "emr": ({}, lambda x: twin.emr(deltas(x), x.weights), {}),
    "fisher": ({"floor": 1e-5}, lambda x: twin.fisher(deltas(x), x.weights, diagonals(x), 1e-5), {"positive": True}),
    "regmean": ({}, lambda x: twin.regmean(deltas(x), x.weights, seconds(x), 0.9, 1e-6), {"positive": True}),
    "mats": ({}, lambda x: mats(x, 2), {"positive": True}),
    "least_squares": ({}, lambda x: twin.least_squares(deltas(x), x.weights, seconds(x)), {"positive": True}),
    "tsv": ({}, lambda x: twin.tsv(deltas(x), x.weights), {}),
    "iso_c": ({}, lambda x: twin.iso_c(deltas(x), x.weights), {}),
    "iso_cts": ({"common": 0.5}, lambda x: twin.iso_cts(deltas(x), x.weights, 0.5, x.total_rank), {}),
    "knots": ({"density": 0.4, "scope": "module"}, lambda x: twin.knots(deltas(x), x.weights, 0.4), {}),
    "core_space": (
        {"density": 0.4},
        lambda x: twin.core_space([a.numpy() for a in x.A], [b.numpy() for b in x.B], x.weights, 0.4),
        {},
    ),
    "ssr": (
        {"ridge": 1e-3},
        lambda x: twin.ssr([a.numpy() for a in x.A], [b.numpy() for b in x.B], x.weights, seconds(x), 1e-3),
        {"positive": True},
    ),
    "swudi": ({}, lambda x: twin.swudi(deltas(x), x.weights), {"positive": True}),
    "wudi": ({}, lambda x: twin.wudi(deltas(x), x.weights), {"positive": True}),
    "slerp": ({"t": 0.3}, lambda x: twin.slerp(deltas(x), 0.3), {"tasks": 2, "positive": True}),
    "multi_slerp": ({}, lambda x: twin.spherical_mean(deltas(x), x.weights, 1), {"positive": True}),
    "karcher": ({"steps": 50}, lambda x: twin.spherical_mean(deltas(x), x.weights, 50), {"positive": True}),
}


def test_every_method_has_a_twin():
    assert set(TWINS) == set(merge_methods())


def dense(result: LoraFactors | DenseDelta | Truncated) -> np.ndarray:
    if isinstance(result, DenseDelta):
        return result.dense().numpy()
    factors = result.factors if isinstance(result, Truncated) else result
    return factors.delta(torch.float64).numpy()


@pytest.mark.parametrize("method", sorted(TWINS))
def test_method_equals_its_twin(method):
    options, reference, drawn = TWINS[method]
    rng = np.random.default_rng(sorted(TWINS).index(method))
    compared = 0
    while compared < CASES:
        x = random_module(rng, **drawn)
        try:
            found = dense(merge_methods()[method].function(x, **options))
        except InputError as e:  # 1 x 1 deltas are parallel or antipodal
            assert "antipodal" in str(e) or "cancel" in str(e)
            continue
        expected = reference(x)
        size = max(np.abs(d).max() for d in deltas(x))
        assert np.abs(found - expected).max() <= 2e-6 * size + 2e-6 * np.abs(expected).max(), (
            compared,
            x.shape,
            x.ranks,
        )
        compared += 1


@pytest.mark.parametrize("solves", [1, 3, 4])
def test_mats_turns_from_columns_to_rows_and_back(solves):
    rng = np.random.default_rng(solves)
    for _ in range(30):
        x = random_module(rng, positive=True)
        found = merge_methods()["mats"].function(x, solves=solves)
        assert found.rank <= x.total_rank
        assert np.abs(dense(found) - mats(x, solves)).max() <= 4e-6 * max(np.abs(d).max() for d in deltas(x))


def kronecker(x: MergeInputs) -> list[np.ndarray]:
    """Each task's block of the Fisher information, (out in, out in)."""
    sides = zip(x.output_gradients, x.moments, x.weights, strict=True)
    return [
        w * np.kron(twin.kfac_side(g.dense().numpy(), 0.9, 1e-6), twin.kfac_side(m.dense().numpy(), 0.9, 1e-6))
        for g, m, w in sides
    ]


def test_mats_is_the_papers_where_its_rank_suffices_and_near_it_else():
    """The paper's objective: never above RegMean's, less with every turn, and the least of all where R reaches the outputs."""
    from scipy.sparse.linalg import cg

    rng = np.random.default_rng(0)
    whole = narrow = 0
    while whole < 10 or narrow < 10:
        x = random_module(rng, tasks=3, positive=True)
        F, D = kronecker(x), deltas(x)
        loss = lambda W: sum(float((W - d).ravel() @ f @ (W - d).ravel()) for f, d in zip(F, D, strict=True))  # noqa: B023, E731
        system, target = sum(F), sum(f @ d.ravel() for f, d in zip(F, D, strict=True))
        paper = cg(system, target, rtol=1e-12, maxiter=10_000)[0].reshape(x.shape)  # as the authors solve it
        made = [dense(merge_methods()["mats"].function(x, solves=n)) for n in (1, 2, 3)]
        if x.total_rank >= x.shape[0]:
            whole += 1
            assert np.abs(made[0] - paper).max() <= 1e-5 * np.abs(paper).max()
            continue
        narrow += 1
        losses = [loss(dense(merge_methods()["regmean"].function(x))), *map(loss, made), loss(paper)]
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses)), losses


def test_mats_says_where_conjugate_gradients_are_not_there(monkeypatch):
    rng = np.random.default_rng(3)
    x = next(x for x in (random_module(rng, tasks=3, positive=True) for _ in range(100)) if min(x.shape) > 4)
    few = merge_methods()["mats"].function(x, iterations=1, solves=1)  # as the paper stops, early
    assert not np.allclose(dense(few), mats(x, 1), rtol=1e-3)
    monkeypatch.setattr("plait.merging.methods.mats._MOST", 2)
    with pytest.raises(RunError, match=r"layer.q: conjugate gradients leave .* after 2 steps"):
        merge_methods()["mats"].function(x)


def words_at(x: MergeInputs, place: str, parts: list[np.ndarray]) -> list[np.ndarray]:
    return [draw(x, t, Place(place), part.shape).astype(np.int64) for t, part in enumerate(parts)]


# method -> (options, twin of the entries in a space)
RULES = {
    "ties": ({"density": 0.3, "scope": "module"}, lambda x, parts, place: twin.ties(parts, x.weights, 0.3)),
    "dare_linear": (
        {"density": 0.7},
        lambda x, parts, place: twin.combination(
            twin.dropped(parts, words_at(x, place, parts), round(0.7 * 65536)), x.weights
        ),
    ),
    "della": (
        {"density": 0.5, "epsilon": 0.3},
        lambda x, parts, place: twin.elect(twin.mag_prune(parts, words_at(x, place, parts), 0.5, 0.3), x.weights),
    ),
    "breadcrumbs": (
        {"density": 0.6, "gamma": 0.1},
        lambda x, parts, place: twin.breadcrumbs(parts, x.weights, 0.6, 0.1),
    ),
    "sce": ({"density": 0.3}, lambda x, parts, place: twin.sce(parts, x.weights, 0.3)),
    "emr": ({}, lambda x, parts, place: twin.emr(parts, x.weights)),
}


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", sorted(RULES))
def test_method_equals_its_twin_in_another_space(method, space):
    """Modules whose singular values are all there and apart: elsewhere the basis is not unique."""
    options, rule = RULES[method]
    rng = np.random.default_rng(sorted(RULES).index(method))
    for _ in range(60):
        x = full_rank_module(rng)
        found = merge_methods()[method].function(x, **options, space=space)
        assert isinstance(found, LoraFactors) and found.rank <= x.total_rank
        A, B = [a.numpy() for a in x.A], [b.numpy() for b in x.B]
        one = lambda parts: rule(x, parts, space)  # noqa: B023, E731
        expected = twin.in_core(A, B, one) if space == "core" else twin.in_knots(deltas(x), one)
        size = max(np.abs(d).max() for d in deltas(x))
        assert np.abs(dense(found) - expected).max() <= 1e-5 * max(size, np.abs(expected).max())


def full_rank_module(rng: np.random.Generator) -> MergeInputs:
    tasks, (out, width) = int(rng.integers(2, 4)), (int(n) for n in rng.integers(9, 14, 2))
    A = [torch.tensor(rng.standard_normal((2, width))) for _ in range(tasks)]
    B = [torch.tensor(rng.standard_normal((out, 2))) for _ in range(tasks)]
    weights = tuple(rng.uniform(0.5, 1.5, tasks).tolist())
    return MergeInputs("layer.q", tuple(f"t{i}" for i in range(tasks)), weights, tuple(A), tuple(B), seed=3)


def test_fisher_has_no_other_space():
    x = random_module(np.random.default_rng(0), tasks=2, positive=True)
    for space in ("core", "knots"):
        with pytest.raises(UsageError, match="fisher has no space"):
            merge_methods()["fisher"].function(x, space=space)


def test_svc_equals_its_twin():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        x = random_module(rng)
        merged = x.combination(x.weights)
        found = calibrated(x, merged)
        ours = (found.B @ found.A).double().numpy() * found.scaling
        weighted = [d * w for d, w in zip(deltas(x), x.weights, strict=True) if np.any(d) and w]
        expected = twin.svc_after(sum(weighted), weighted) if weighted else ours * 0
        assert np.abs(ours - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-30)


def test_svc_leaves_one_adapter_and_makes_one_of_its_copies():
    x = random_module(np.random.default_rng(1), tasks=1)
    one = replace(x, weights=(1.0,))
    copies = replace(x, tasks=("a", "b", "c"), weights=(1.0,) * 3, A=x.A * 3, B=x.B * 3)
    for module in (one, copies):
        found = calibrated(module, module.combination(module.weights))
        own = (x.B[0] @ x.A[0]).float()
        assert torch.allclose((found.B @ found.A).float(), own, atol=1e-5 * float(own.abs().max()))


def test_svc_does_not_depend_on_how_equal_directions_are_chosen():
    """A merge whose singular values are all equal, by two bases of the same space."""
    x = random_module(np.random.default_rng(4), tasks=3)
    g = torch.Generator().manual_seed(1)
    core = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=g))[0]
    A, B = (
        tuple(torch.randn(*shape, dtype=torch.float64, generator=g) for _ in range(3)) for shape in ((2, 7), (9, 2))
    )
    wide = replace(x, weights=(1.0,) * 3, A=A, B=B)
    left, right = torch.linalg.qr(torch.cat(wide.B, 1))[0], torch.linalg.qr(torch.cat(wide.A).T)[0]
    one, two = (
        LoraFactors(right.T.float(), left.float()),
        LoraFactors((core.T @ right.T).float(), (left @ core).float()),
    )
    a, b = calibrated(wide, one), calibrated(wide, two)
    assert torch.allclose(one.B @ one.A, two.B @ two.A, atol=1e-5)
    assert torch.allclose(a.B @ a.A, b.B @ b.A, atol=1e-4 * float((a.B @ a.A).abs().max()))


def test_svc_takes_rounding_for_no_answer():
    """Tasks that write to different outputs share nothing, whatever the last digits say: nothing is divided by a noise of 1e-9."""
    g = torch.Generator().manual_seed(0)
    A = tuple(torch.randn(2, 9, generator=g) for _ in range(2))
    B = (torch.zeros(12, 2), torch.zeros(12, 2))
    B[0][:6], B[1][6:] = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g)
    B[1][:6] += 1e-9 * torch.randn(6, 2, generator=g)
    x = MergeInputs("q", ("a", "b"), (1.0, 1.0), A, B)
    before = x.combination(x.weights)
    after = calibrated(x, before)
    ratio = (
        torch.linalg.svdvals((after.B @ after.A).double())[:4]
        / torch.linalg.svdvals((before.B @ before.A).double())[:4]
    )
    assert float(ratio.min()) > 0.1 and float(ratio.max()) < 10


def test_pico_equals_its_twin():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        x = random_module(rng)
        y = shrink_shared_directions(x)
        expected = twin.pico_before([a.numpy() for a in x.A], [b.numpy() for b in x.B])
        size = max(np.abs(d).max() for d in deltas(x))
        for found, wanted in zip(deltas(y), expected, strict=True):
            assert np.abs(found - wanted).max() <= 1e-5 * size
        norms = [np.linalg.norm(d) for d in deltas(x)]
        assert 2.0 * mean_norm_factor(y, 2.0) == pytest.approx(np.mean(norms), rel=1e-5)
