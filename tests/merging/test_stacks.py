"""Modules computed together: what they give alone, whatever becomes of one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError, RunError
from plait.merging import Plan, merge_methods, plan_merge
from plait.merging.batched import grouped, stack_of
from plait.merging.factors import FactorStack, PartingError, common_count

LIKE = {f"l.{i}.q": (48, 40) for i in range(4)}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("tsv", {"triplets": 2}),
    ("iso_c", {}),
    *(("core_space", {"rule": r}) for r in ("ties", "dare_ties", "dare_linear", "sum")),
    ("core_space", {"isotropic": True, "density": 0.9}),
]
every_case = pytest.mark.parametrize(("method", "options"), CASES, ids=str)


def adapters(modules=LIKE, ranks=(3, 3, 5), seed=0) -> list[Adapter]:
    g = torch.Generator().manual_seed(seed)
    return [
        Adapter(
            f"t{t}",
            "base",
            {
                m: LoraFactors(torch.randn(r, i, generator=g), torch.randn(o, r, generator=g), 0.5)
                for m, (o, i) in modules.items()
            },
        )
        for t, r in enumerate(ranks)
    ]


def changed(given: list[Adapter], task: int, module: str, A=None, B=None) -> list[Adapter]:
    """The same adapters, but for the factors of one module of one of them."""
    one = given[task]
    f = one.modules[module]
    new = LoraFactors(f.A if A is None else A(f.A), f.B if B is None else B(f.B), f.scaling)
    return [*given[:task], Adapter(one.name, one.base, {**one.modules, module: new}), *given[task + 1 :]]


def alone(plan: Plan) -> dict[str, LoraFactors]:
    return {m: plan.merged(m)[0] for m in plan.common.modules}


def difference(one: LoraFactors, other: LoraFactors) -> float:
    a, b = one.delta(torch.float64), other.delta(torch.float64)
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def same_bits(one: LoraFactors, other: LoraFactors) -> bool:
    return torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, ...]]:
    """The stacks that were computed at once, without one of them having to be taken apart."""
    done: list[tuple[str, ...]] = []
    usual, alone = Plan.merged_together, Plan.merged
    apart: list[str] = []

    def noted(plan, names):
        apart.clear()
        pairs = usual(plan, names)
        if len(names) > 1 and not apart:
            done.append(tuple(names))
        return pairs

    def noted_alone(plan, module):
        apart.append(module)
        return alone(plan, module)

    monkeypatch.setattr(Plan, "merged_together", noted)
    monkeypatch.setattr(Plan, "merged", noted_alone)
    return done


def test_every_method_that_takes_stacks_is_compared():
    assert {m for m, _ in CASES} == {m for m, found in merge_methods().items() if found.stacks}


@every_case
@pytest.mark.parametrize("ranks", [(3, 3, 5), (4, 4, 4), (2, 6), (30, 30)], ids=str)
def test_a_stack_gives_what_its_members_give_alone(method, options, ranks, called):
    plan = plan_merge(adapters(ranks=ranks), method, options=options, weights=[0.5, -1.0, 2.0][: len(ranks)], scale=1.0)
    found = plan.run("x").adapter.modules
    assert list(found) == list(LIKE)
    assert called == ([] if sum(ranks) > 40 else [tuple(LIKE)])  # more columns than rows: QR, one by one
    for m, f in alone(plan).items():
        assert found[m].A.shape == f.A.shape and found[m].B.shape == f.B.shape
        assert difference(found[m], f) < 5e-7


@every_case
def test_rank_scale_and_calibration_are_each_members_own(method, options, called):
    plan = plan_merge(adapters(), method, options=options, scale=0.3, rank=4, calibrate="pico")
    done, wanted = plan.run("x"), {m: plan.merged(m) for m in LIKE}
    assert called == [tuple(LIKE)]
    for m, (f, _) in wanted.items():
        assert done.adapter.modules[m].rank == 4 and difference(done.adapter.modules[m], f) < 2e-6
    record = plan.record({m: f for m, (f, _) in wanted.items()}, {m: lost for m, (_, lost) in wanted.items()})
    assert done.record.loss.discarded_energy == pytest.approx(record.loss.discarded_energy, rel=1e-5)
    assert done.record.loss.worst_module.name == record.loss.worst_module.name


DEGENERATE = {
    "zero": {"B": torch.zeros_like},
    "a zero column": {"A": lambda A: A * torch.tensor([[1.0], [0.0], [1.0]])},
    "dependent rows": {"A": lambda A: A[[0, 1, 0]]},
    "ill": {"B": lambda B: torch.cat([B[:, :2], B[:, :1] + 1e-5 * B[:, 2:]], dim=1)},
}


@every_case
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("module", ["l.0.q", "l.2.q"])
def test_with_one_degenerate_member_all_are_computed_alone(method, options, kind, module, called):
    plan = plan_merge(changed(adapters(), 1, module, **DEGENERATE[kind]), method, options=options, scale=1.0)
    found = plan.run("x").adapter.modules
    assert called == []
    assert all(same_bits(found[m], f) for m, f in alone(plan).items())


@every_case
def test_an_error_names_the_member(method, options):
    huge = changed(adapters(), 0, "l.2.q", A=lambda A: A * 1e36, B=lambda B: B * 1e36)
    with pytest.raises(RunError) as alone_:
        plan_merge(huge, method, options=options, scale=1e12).merged("l.2.q")
    with pytest.raises(RunError, match=r"l\.2\.q") as together:
        plan_merge(huge, method, options=options, scale=1e12).run("x")
    assert str(together.value) == str(alone_.value)


def test_a_count_that_differs_parts_the_members():
    assert common_count(torch.tensor([[True, False], [False, True]])) == 1
    assert common_count(torch.tensor([True, True])) == 2
    with pytest.raises(PartingError):
        common_count(torch.tensor([[True, False], [True, True]]))


def test_only_likes_are_grouped():
    modules = {"a.q": (48, 40), "a.v": (24, 40), "b.q": (48, 40), "b.v": (24, 40), "c.q": (48, 40)}
    given = adapters(modules)
    short = changed(given, 2, "b.q", A=lambda A: A[:2], B=lambda B: B[:, :2])
    assert plan_merge(given, "tsv", scale=1.0).groups() == [["a.q", "b.q", "c.q"], ["a.v", "b.v"]]
    assert plan_merge(short, "tsv", scale=1.0).groups() == [["a.q", "c.q"], ["a.v", "b.v"], ["b.q"]]
    lacking = [*given[:2], Adapter("t2", "base", {m: f for m, f in given[2].modules.items() if m != "a.v"})]
    assert plan_merge(lacking, "tsv", scale=1.0).groups() == [["a.q", "b.q", "c.q"], ["a.v"], ["b.v"]]
    assert plan_merge(given, "iso_cts", scale=1.0).groups() == [[m] for m in modules]
    for changed_ in (short, lacking):
        plan = plan_merge(changed_, "core_space", scale=1.0)
        found = plan.run("x").adapter.modules
        assert list(found) == list(modules) and all(difference(found[m], f) < 5e-7 for m, f in alone(plan).items())


def test_groups_are_small_and_large_modules_stay_alone():
    assert grouped((f"m{i}", i % 2, 2) for i in range(7)) == [["m0", "m2"], ["m1", "m3"], ["m4", "m6"], ["m5"]]
    few = plan_merge(adapters({f"l.{i}": (16, 17) for i in range(9)}), "tsv", scale=1.0).groups()
    assert [len(names) for names in few] == [4, 4, 1]
    wide = plan_merge(adapters({f"l.{i}": (10, 17) for i in range(3)}), "tsv", scale=1.0).groups()  # R is 11
    assert [len(names) for names in wide] == [1, 1, 1]
    large = adapters({f"l.{i}": (30000, 30000) for i in range(3)}, ranks=(10,))
    assert [len(names) for names in plan_merge(large, "tsv", scale=1.0).groups()] == [1, 1, 1]


def test_factors_of_a_stack():
    plan = plan_merge(adapters(), "iso_c", scale=1.0)
    x = stack_of([plan.view(m) for m in LIKE])
    assert x.shape == (48, 40) and x.ranks == (3, 3, 5)
    found = plan.method.function(x)
    assert isinstance(found, FactorStack) and found.rank == 11 and found.shape == (48, 40)
    assert len(found.members()) == 4 and not any(f.delta().any() for f in x.zero().members())
    with pytest.raises(InputError, match="no stack"):
        FactorStack(torch.zeros(2, 3), torch.zeros(4, 2))
