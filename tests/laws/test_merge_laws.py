"""The laws table: what each merging method must satisfy, and what it does with degenerate inputs.

A registered method without a row fails the suite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError, PlaitError, UsageError
from plait.merging import Merged, merge, merge_methods
from plait.merging.calibration import CALIBRATIONS
from plait.statistics.fisher import FisherDiagonal
from plait.statistics.moments import ModuleInfo, Moments, Statistics


@dataclass(frozen=True)
class Law:
    """One row. `identity`: one adapter of weight 1 comes back. `power`: merged(c D) = c^power merged(D).

    `zero`, `antipodal`, `cancelling`: the error raised for a zero delta beside another, D and -D, weights +1 and -1;
    None where the result must be finite and, where a value is given by `expect`, equal to it.
    """

    identity: bool = True
    power: float = 1.0
    permutes: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    tasks: int = 3
    zero: type[PlaitError] | None = None
    antipodal: type[PlaitError] | None = None
    antipodal_is_zero: bool = True
    cancelling: type[PlaitError] | None = None
    cancelled_is_difference: bool = False


LAWS = {
    "linear": Law(cancelling=UsageError),
    "task_arithmetic": Law(cancelled_is_difference=True),
    "cat": Law(cancelled_is_difference=True),
    "svd": Law(options={"svd_rank": 12}, cancelled_is_difference=True),
    "ties": Law(identity=False, antipodal_is_zero=False),
    "dare_linear": Law(identity=False, antipodal_is_zero=False),
    "dare_ties": Law(identity=False, antipodal_is_zero=False),
    "della": Law(identity=False, antipodal_is_zero=False),
    "sparse_arithmetic": Law(
        options={"drop": "small", "density": 0.5, "elect": True, "normalise": True},  # small norms are not rescaled
        identity=False,
        antipodal_is_zero=False,
    ),
    "breadcrumbs": Law(identity=False, antipodal_is_zero=True),
    "sce": Law(antipodal_is_zero=False),
    "emr": Law(antipodal_is_zero=False),
    "fisher": Law(cancelling=UsageError),
    "regmean": Law(antipodal_is_zero=False, cancelling=UsageError),
    "mats": Law(antipodal_is_zero=False, cancelling=UsageError),
    "ssr": Law(antipodal_is_zero=False, cancelling=UsageError),
    "least_squares": Law(antipodal_is_zero=False, cancelling=UsageError),
    "tsv": Law(antipodal_is_zero=False),
    "iso_c": Law(identity=False),
    "iso_cts": Law(identity=False, antipodal_is_zero=True),
    "knots": Law(identity=False, antipodal_is_zero=False),
    "core_space": Law(identity=False, antipodal_is_zero=False),
    "wudi": Law(antipodal_is_zero=True, cancelling=UsageError),
    "swudi": Law(antipodal_is_zero=True, cancelling=UsageError),
    "slerp": Law(tasks=2, permutes=True, identity=False, zero=InputError, antipodal=InputError, cancelling=UsageError),
    "multi_slerp": Law(zero=InputError, antipodal=InputError, cancelling=UsageError),
    "karcher": Law(zero=InputError, antipodal=InputError, cancelling=UsageError),
}
MODULES = {"layers.0.q": (9, 7), "layers.0.v": (6, 7), "layers.1.q": (9, 7)}


def test_every_method_has_a_row():
    assert set(LAWS) == set(merge_methods())


def adapter(name: str, seed: int, modules=MODULES, rank: int = 2, dtype=torch.float32, size: float = 1.0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    made = {
        m: LoraFactors(
            (torch.randn(rank, i, generator=g) * size).to(dtype), torch.randn(o, rank, generator=g).to(dtype), 0.5
        )
        for m, (o, i) in modules.items()
    }
    return Adapter(name, "base", made)


def statistics(adapters: list[Adapter]) -> dict[str, Any]:
    """Moments on both sides and a Fisher diagonal in one object per task, so that every method finds what it needs."""
    return {a.name: _Both(a) for a in adapters}


class _Both:
    def __init__(self, a: Adapter):
        g = torch.Generator().manual_seed(sum(map(ord, a.name)))
        self.sites, self.modules, self.outputs = {}, {}, {}
        for m, f in sorted(a.modules.items()):
            h = torch.randn(40, f.shape[1], generator=g, dtype=torch.float64)
            self.sites[m] = Moments(40, h.sum(0), h.T @ h)
            g_out = torch.Generator().manual_seed(7 + sum(map(ord, a.name + m)))
            y = torch.randn(40, f.shape[0], generator=g_out, dtype=torch.float64)
            self.outputs[m] = Moments(40, y.sum(0), y.T @ y)
        self.fisher = FisherDiagonal.held(
            {m: torch.rand(f.shape, generator=g) for m, f in sorted(a.modules.items())}, 1
        )

    def moments_for(self, module: str):
        return self.sites.get(module)

    def output_gradients_for(self, module: str):
        return self.outputs.get(module)

    def diagonal_for(self, module: str):
        return self.fisher.diagonal_for(module)


def run(method: str, adapters: list[Adapter], **given: Any) -> Merged:
    given.setdefault("options", LAWS[method].options)
    return merge(adapters, method, statistics=statistics(adapters), **{"scale": 1.0} | given)


def dense(done: Merged) -> dict[str, torch.Tensor]:
    return {m: f.delta(torch.float64) for m, f in done.adapter.modules.items()}


def close(a: Merged, b: Merged | dict[str, torch.Tensor], factor: float = 1.0, tolerance: float = 2e-5) -> None:
    other = b if isinstance(b, dict) else dense(b)
    for m, d in dense(a).items():
        size = max(float(d.abs().max()), float(other[m].abs().max()) * abs(factor), 1e-12)
        assert float((d - factor * other[m]).abs().max()) <= tolerance * size, m


@pytest.fixture(params=sorted(LAWS))
def method(request) -> str:
    return request.param


@pytest.fixture
def trio(method) -> list[Adapter]:
    return [adapter(n, i) for i, n in enumerate(["one", "two", "three"][: LAWS[method].tasks])]


def test_order_of_the_adapters_does_not_matter(method, trio):
    weights = [0.5, 1.0, 2.0][: len(trio)]
    close(run(method, trio, weights=weights), run(method, trio[::-1], weights=weights[::-1]))


def same_bytes(a: Merged, b: Merged) -> bool:
    pairs = [(a.adapter.modules[m], b.adapter.modules[m]) for m in MODULES]
    return all(torch.equal(one.A, two.A) and torch.equal(one.B, two.B) for one, two in pairs)


def test_the_same_set_gives_the_same_bytes_in_any_order(method, trio):
    """Weights and statistics follow their adapters; the record keeps the order given."""
    weights = [0.5, 1.0, 2.0][: len(trio)]
    first = run(method, trio, weights=weights)
    for order in ([1, 0], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        if len(order) == len(trio):
            other = run(method, [trio[i] for i in order], weights=[weights[i] for i in order])
            assert same_bytes(first, other)
            assert other.record.tasks == tuple(trio[i].name for i in order)
            assert other.record.weights == tuple(weights[i] for i in order)


def test_a_place_on_an_arc_counts_from_the_first_adapter_given():
    """t = 0 is the first of the two, whatever it is called."""
    a, b = adapter("a", 0), adapter("b", 1)
    for first, second in ((a, b), (b, a)):
        done = run("slerp", [first, second], options={"t": 0.0})
        close(done, {m: f.delta(torch.float64) for m, f in first.modules.items()})


def test_order_of_the_modules_does_not_matter(method, trio):
    turned = [Adapter(a.name, a.base, dict(reversed(a.modules.items()))) for a in trio]
    close(run(method, trio), run(method, turned), tolerance=0.0)


def test_scale_multiplies_the_merged_delta(method, trio):
    close(run(method, trio, scale=-0.3), run(method, trio), factor=-0.3)


SPACIOUS = sorted(m for m, found in merge_methods().items() if "space" in found.options and m != "fisher")


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", SPACIOUS)
def test_another_space_keeps_the_laws_and_gives_exact_factors(method, space):
    three = [adapter(n, i) for i, n in enumerate(["one", "two", "three"])]
    options = LAWS[method].options | {"space": space}
    done = run(method, three, options=options, weights=[0.5, 1.0, 2.0])
    close(done, run(method, three[::-1], options=options, weights=[2.0, 1.0, 0.5]))
    close(run(method, three, options=options, weights=[0.5, 1.0, 2.0], scale=-0.3), done, factor=-0.3)
    assert done.record.loss.discarded_energy == 0.0 and done.record.verification_error < 1e-5
    assert all(f.rank <= 6 for f in done.adapter.modules.values())
    zero = [adapter(n, i, size=0.0) for i, n in enumerate(["one", "two", "three"])]
    assert not any(d.any() for d in dense(run(method, zero, options=options)).values())


@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_size_of_the_deltas_passes_through(method, size):
    law = LAWS[method]
    small = [adapter(n, i) for i, n in enumerate(["one", "two", "three"][: law.tasks])]
    large = [
        Adapter(a.name, a.base, {m: LoraFactors(f.A, f.B, f.scaling * size) for m, f in a.modules.items()})
        for a in small
    ]
    if method.startswith(("dare", "della")):  # masks follow the content, which has changed
        assert all(torch.isfinite(d).all() for d in dense(run(method, large)).values())
    else:
        close(run(method, large), run(method, small), factor=size**law.power)


def test_same_seed_same_bits(method, trio):
    a, b = run(method, trio, seed=3), run(method, trio, seed=3)
    for m, f in a.adapter.modules.items():
        assert torch.equal(f.A, b.adapter.modules[m].A) and torch.equal(f.B, b.adapter.modules[m].B)


def test_one_adapter(method):
    a = adapter("alone", 5)
    if method == "slerp":
        with pytest.raises(UsageError, match="two adapters"):
            run(method, [a])
        return
    done = run(method, [a])
    if LAWS[method].identity:
        close(done, {m: f.delta(torch.float64) for m, f in a.modules.items()})


def test_result_is_verified_finite_and_float32(method, trio):
    done = run(method, trio)
    assert done.record.verification_error < 1e-5
    for f in done.adapter.modules.values():
        assert f.A.dtype == f.B.dtype == torch.float32
        assert torch.isfinite(f.A).all() and torch.isfinite(f.B).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_merged_in_float32(method, trio, dtype):
    halves = [
        Adapter(a.name, a.base, {m: LoraFactors(f.A.to(dtype), f.B.to(dtype), f.scaling) for m, f in a.modules.items()})
        for a in trio
    ]
    wide = [
        Adapter(a.name, a.base, {m: LoraFactors(f.A.float(), f.B.float(), f.scaling) for m, f in a.modules.items()})
        for a in halves
    ]
    close(run(method, halves), run(method, wide), tolerance=0.0)


def test_tensors_of_one_row_and_one_column(method):
    shapes = {"row": (1, 7), "column": (6, 1), "both": (1, 1)}
    tasks = LAWS[method].tasks
    try:
        done = run(method, [adapter(f"t{i}", i, shapes) for i in range(tasks)])
    except InputError as e:  # two numbers of opposite sign are antipodal
        assert "antipodal" in str(e) or "cancel" in str(e)
        return
    assert {m: f.shape for m, f in done.adapter.modules.items()} == shapes


def expected_or_error(
    method: str, adapters: list[Adapter], error: type[PlaitError] | None, **given: Any
) -> Merged | None:
    if error is None:
        done = run(method, adapters, **given)
        assert all(torch.isfinite(d).all() for d in dense(done).values())
        return done
    with pytest.raises(error):
        run(method, adapters, **given)
    return None


def zeroed(a: Adapter, name: str) -> Adapter:
    return Adapter(name, a.base, {m: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for m, f in a.modules.items()})


def test_zero_delta_beside_others(method, trio):
    expected_or_error(method, [*trio[:-1], zeroed(trio[-1], "zero")], LAWS[method].zero)


def test_all_deltas_zero_give_zero(method, trio):
    done = run(method, [zeroed(a, a.name) for a in trio])
    assert all(d.abs().max() == 0 for d in dense(done).values())


def test_antipodal_pair(method):
    a = adapter("up", 0)
    b = Adapter("down", a.base, {m: LoraFactors(f.A, -f.B, f.scaling) for m, f in a.modules.items()})
    done = expected_or_error(method, [a, b], LAWS[method].antipodal)
    if done and LAWS[method].antipodal_is_zero and method != "fisher":
        largest = max(float(f.delta().abs().max()) for f in a.modules.values())
        assert all(d.abs().max() <= 1e-5 * largest for d in dense(done).values())


def test_weights_that_sum_to_zero(method, trio):
    pair = trio[:2]
    done = expected_or_error(method, pair, LAWS[method].cancelling, weights=[1.0, -1.0])
    if done and LAWS[method].cancelled_is_difference:
        close(done, {m: f.delta() - pair[1].modules[m].delta() for m, f in pair[0].modules.items()})


def test_the_same_adapter_twice_is_a_singular_system(method):
    a = adapter("first", 0)
    twin = Adapter("second", a.base, a.modules)
    done = run(method, [a, twin])
    assert all(torch.isfinite(d).all() for d in dense(done).values())
    if method in ("linear", "least_squares", "regmean", "slerp", "multi_slerp", "karcher", "wudi", "emr", "fisher"):
        close(done, {m: f.delta() for m, f in a.modules.items()}, tolerance=1e-4)


def test_one_shared_A_merges_exactly_at_its_rank(method):
    a = [adapter(n, i) for i, n in enumerate(["one", "two"])]
    shared = [
        Adapter(x.name, x.base, {m: LoraFactors(a[0].modules[m].A, f.B, f.scaling) for m, f in x.modules.items()})
        for x in a
    ]
    done = run(method, shared, rank=2)
    if method in ("linear", "task_arithmetic", "cat", "svd", "slerp", "karcher", "multi_slerp", "least_squares"):
        assert done.record.loss.discarded_energy < 1e-10


def test_missing_modules_are_zero(method):
    pair = [adapter("q", 0, {"layers.0.q": (9, 7)}), adapter("both", 1)]
    if LAWS[method].zero:
        with pytest.raises(LAWS[method].zero):
            run(method, pair)
        return
    done = run(method, pair)
    assert done.record.missing == {"q": ["layers.0.v", "layers.1.q"]}
    assert all(torch.isfinite(d).all() for d in dense(done).values())


@pytest.mark.parametrize("calibrate", [None, "pico"])
def test_a_weight_of_zero_leaves_the_adapter_out(method, trio, calibrate):
    weights = [1.0, 0.5, 2.0][: len(trio)]
    idle = adapter("idle", 7, rank=3)
    if LAWS[method].tasks < 3:  # an arc has two ends
        close(run(method, [trio[0], idle], weights=[1.0, 0.0]), dense(run("linear", trio[:1])))
        return
    alone = run(method, trio, weights=weights, calibrate=calibrate)
    beside = run(method, [*trio, idle], weights=[*weights, 0.0], calibrate=calibrate)
    close(beside, alone)
    assert beside.record.rank == alone.record.rank
    assert beside.record.weights == (*weights, 0.0)


def test_different_ranks(method):
    done = run(method, [adapter(f"t{i}", i, rank=1 + 2 * i) for i in range(LAWS[method].tasks)])
    assert done.record.verification_error < 1e-5


@pytest.mark.parametrize("calibrate", CALIBRATIONS)
def test_rank_and_calibrations_compose_with_every_method(method, trio, calibrate):
    done = run(method, trio, rank=2, calibrate=calibrate)
    assert done.record.rank <= 2 and done.record.calibrate == calibrate
    assert 0 <= done.record.loss.discarded_energy < 1 and done.record.verification_error < 1e-4


def test_huge_weights_stay_finite_or_raise(method, trio):
    try:
        done = run(method, trio, weights=[1e6] * len(trio), scale=1e5)
    except PlaitError as e:
        assert "finite" in str(e) or "singular" in str(e)
        return
    assert all(torch.isfinite(f.A).all() and torch.isfinite(f.B).all() for f in done.adapter.modules.values())


def test_statistics_are_asked_for(method, trio):
    if merge_methods()[method].needs:
        with pytest.raises(UsageError, match="needs"):
            merge(trio, method, scale=1.0)


def test_real_statistics_type_is_understood(trio, method):
    if merge_methods()[method].needs != ("moments",):
        return
    modules = {m: ModuleInfo(site=m, shape=s, output_energy=None, fan_in_fan_out=False) for m, s in MODULES.items()}
    sites = {m: Moments(5, torch.zeros(i), torch.eye(i) * 5) for m, (_, i) in MODULES.items()}
    done = merge(
        trio,
        method,
        statistics={a.name: Statistics(sites=sites, modules=modules, provenance={}) for a in trio},
        scale=1.0,
    )
    assert all(torch.isfinite(d).all() for d in dense(done).values())


def test_nan_is_refused_and_named(method, trio):
    f = trio[0].modules["layers.0.v"]
    broken = {
        **trio[0].modules,
        "layers.0.v": LoraFactors(f.A.clone().index_fill_(0, torch.tensor([0]), float("nan")), f.B),
    }
    with pytest.raises(InputError, match=r"layers\.0\.v.*NaN"):
        run(method, [Adapter("one", "base", broken), *trio[1:]])
