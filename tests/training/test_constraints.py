"""Constraints: what they promise holds in a plain loop, in the Trainer and in a fleet."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.disk.store import identity
from plait.errors import InputError, UsageError
from plait.model.base import load_task_model, load_tokenizer
from plait.statistics import collect_statistics
from plait.statistics.moments import Moments
from plait.statistics.output_gradients import with_output_gradients
from plait.tasks import batches, encode
from plait.training import Member, TrainingSettings, attach_constraint, prepare_constraint, train_adapter, train_fleet
from plait.training.constraints import Cell, Constraint, Enforcer, Rule, cells_of, penalty_gradients, stacked_bytes
from plait.training.peft_model import attach, detach, for_task
from tests.tiny import TARGETS, make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=20, lr=5e-3, batch_size=8, max_length=24)
OPTIONS = {"free": {}, "frozen": {}, "projected": {"m": 6}, "penalised": {"beta": 0.5}}
CURVED = "penalised, curved"


@pytest.fixture(scope="module")
def statistics(tiny_base):
    """statistics("bert") -> moments of three tasks."""
    known = {}

    def get(architecture):
        if architecture not in known:
            base = tiny_base(architecture)
            tokenizer, found = load_tokenizer(base), {}
            for i, name in enumerate(("topic", "b", "c")):
                task = make_task(name)
                rows = encode(tokenizer, task, make_examples(task, 40, seed=10 + i), 24)
                model = load_task_model(base, task, seed=0)
                own = collect_statistics(model, batches(tokenizer, rows, 8), TARGETS[architecture])
                found[name] = with_output_gradients(own, model, batches(tokenizer, rows, 8))
            known[architecture] = found
        return known[architecture]

    return get


def with_constraint(kind):
    if kind == CURVED:
        return dataclasses.replace(
            SETTINGS, constraint="penalised", constraint_options={"beta": 0.5, "curvature": True}, scale_from=0.5
        )
    return dataclasses.replace(SETTINGS, constraint=kind, constraint_options=OPTIONS[kind])


def in_span(adapter, constraint):
    """Largest part of any A outside its span, relative to A."""
    worst = 0.0
    for name, rule in constraint.rules.items():
        A = adapter.modules[name].A.double()
        Q = rule.matrix.double()
        worst = max(worst, float((A - A @ Q.T @ Q).norm() / A.norm()))
    return worst


def penalty_of(adapter, constraint):
    return sum(
        rule.weight
        * float(
            torch.trace(
                (torch.eye(f.shape[0]) if rule.outputs is None else rule.outputs).double()
                @ f.delta(torch.float64)
                @ rule.matrix.double()
                @ f.delta(torch.float64).T
            )
        )
        for f, rule in ((adapter.modules[m], r) for m, r in constraint.rules.items())
    )


def test_penalty_gradients_are_those_of_autograd():
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(3, *s, generator=g).double().requires_grad_() for s in ((4, 10), (7, 4)))
    X = torch.randn(3, 20, 10, generator=g).double()
    M, weight = X.transpose(1, 2) @ X, torch.tensor([0.5, 1.0, 2.0]).double()[:, None, None]
    D = B @ A
    value = (weight[:, 0, 0] * (D @ M @ D.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)).sum()
    expected = torch.autograd.grad(value, (A, B))
    with torch.no_grad():
        values, of_A, of_B = penalty_gradients(A, B, A @ M, weight)
    assert torch.allclose(values.sum(), value)
    assert torch.allclose(of_A, expected[0]) and torch.allclose(of_B, expected[1])


def test_penalty_with_curvature_is_the_dense_one():
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(3, *s, generator=g).double().requires_grad_() for s in ((4, 10), (7, 4)))
    M, G = (x.transpose(1, 2) @ x for x in (torch.randn(3, 20, d, generator=g).double() for d in (10, 7)))
    weight = torch.tensor([0.5, 1.0, 2.0]).double()[:, None, None]
    D = B @ A
    value = (weight[:, 0, 0] * (G @ D @ M @ D.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)).sum()
    expected = torch.autograd.grad(value, (A, B))
    with torch.no_grad():
        values, of_A, of_B = penalty_gradients(A, B, A @ M, weight, G @ B)
    assert torch.allclose(values.sum(), value)
    assert torch.allclose(of_A, expected[0]) and torch.allclose(of_B, expected[1])


@pytest.mark.parametrize("uneven", [False, True])
def test_cells_that_share_inputs_and_outputs_are_each_penalised_right(uneven):
    g = torch.Generator().manual_seed(0)
    M1, M2, G1, G2, G3 = (x.T @ x for x in (torch.randn(20, d, generator=g) for d in (8, 8, 5, 5, 5)))
    pairs = [(M1, G1), (M2, G2), (M1, G3), (M2, G2), (M1, G1), (M1, G3)] + [(M1, G1)] * uneven
    made, expected = [], 0.0
    for M, G in pairs:
        A, B = torch.randn(2, 8, generator=g), torch.randn(5, 2, generator=g)
        made.append(Cell(A, B, torch.zeros(2, 8), torch.zeros(5, 2), 2.0, Rule(M, 0.1, G)))
    plain = Cell(
        torch.randn(2, 8, generator=g),
        torch.randn(5, 2, generator=g),
        torch.zeros(2, 8),
        torch.zeros(5, 2),
        1.0,
        Rule(M1, 0.1),
    )
    enforcer = Enforcer([*made, plain])
    enforcer.before_step()
    for c in [*made, plain]:
        A, B = (x.clone().requires_grad_() for x in (c.A, c.B))
        G = torch.eye(5) if c.rule.outputs is None else c.rule.outputs
        value = 0.1 * c.scaling**2 * torch.trace(G @ B @ A @ c.rule.matrix @ A.T @ B.T)
        for x, y in zip(torch.autograd.grad(value, (A, B)), (c.A_gradient, c.B_gradient), strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-3)
        expected += float(value.detach())
    assert enforcer.penalty() == pytest.approx(expected, rel=1e-4)


def test_what_the_matrices_take_on_the_device_is_known_beforehand():
    g = torch.Generator().manual_seed(0)
    M1, M2, G1, G2 = (torch.randn(d, d, generator=g) for d in (8, 8, 5, 5))
    rules = [{"q": Rule(M1, 0.1, G1), "v": Rule(M1, 0.1, G1)}, {"q": Rule(M2, 0.1, G2), "v": Rule(M2, 0.1, G2)}]
    A, B = torch.zeros(2, 8), torch.zeros(5, 2)
    cells = [Cell(A, B, A.clone(), B.clone(), 1.0, rule) for one in rules for rule in one.values()]
    (batch,) = Enforcer(cells)._penalised
    held = sum(4 * stack.matrices.numel() for stack in (batch.inputs, batch.outputs))
    assert stacked_bytes(Constraint("penalised", one) for one in rules) == held == 4 * (2 * 64 + 2 * 25)
    assert stacked_bytes([Constraint("free", {})]) == 0


def test_an_even_curvature_is_the_penalty_without_it(tiny_base, statistics):
    start = make_adapter(tiny_base("bert"), make_task(), "bert")

    def even(width):
        return Moments(9, torch.zeros(width), 3.0 * torch.eye(width))

    known = {
        t: dataclasses.replace(s, output_gradients={n: even(m.shape[0]) for n, m in s.modules.items()})
        for t, s in statistics("bert").items()
    }
    curved = prepare_constraint(with_constraint(CURVED), start, known, task="topic")
    plain = prepare_constraint(with_constraint("penalised"), start, known, task="topic")
    for module, rule in curved.rules.items():
        assert torch.allclose(rule.outputs, torch.eye(len(rule.outputs)))
        assert (rule.weight, plain.rules[module].outputs) == (plain.rules[module].weight, None)
    without = {t: dataclasses.replace(s, output_gradients={}) for t, s in known.items()}
    with pytest.raises(UsageError, match="hold no output gradients"):
        prepare_constraint(with_constraint(CURVED), start, without, task="topic")


def test_a_penalty_of_nothing_moves_nothing(tiny_base, statistics, tmp_path):
    """A weight of zero says that a rule projects."""
    base, task = tiny_base("bert"), make_task()
    members = [
        Member(
            make_adapter(base, task, "bert"), task, make_examples(task), settings, 0, tmp_path / settings.constraint,
            identity("train", {"c": settings.constraint}), statistics("bert"),
        )
        for settings in (
            dataclasses.replace(SETTINGS, steps=4),
            dataclasses.replace(SETTINGS, steps=4, constraint="penalised", constraint_options={"beta": 0.0}),
        )
    ]  # fmt: skip
    free, nothing = train_fleet(members, base)
    for name, f in free.modules.items():
        assert torch.allclose(f.delta(), nothing.modules[name].delta(), atol=1e-6)


def test_cells_that_share_unevenly_are_each_done_right():
    g = torch.Generator().manual_seed(0)
    Q1, Q2 = (torch.linalg.qr(torch.randn(8, 3, generator=g))[0].T.contiguous() for _ in range(2))
    As = [torch.randn(2, 8, generator=g) for _ in range(3)]
    expected = [A @ Q.T @ Q for A, Q in zip(As, (Q1, Q2, Q1), strict=True)]
    cells = [
        Cell(A, torch.zeros(4, 2), torch.zeros(2, 8), torch.zeros(4, 2), 1.0, Rule(Q))
        for A, Q in zip(As, (Q1, Q2, Q1), strict=True)
    ]
    Enforcer(cells).after_step()
    for A, e in zip(As, expected, strict=True):
        assert torch.allclose(A, e, atol=1e-6)


def test_a_thousand_steps_of_a_plain_loop_stay_in_the_span(tiny_base, statistics):
    base, task = tiny_base("bert"), make_task()
    model = load_task_model(base, task, seed=0)
    started = for_task(make_adapter(base, task, "bert"), task, model)
    constraint = prepare_constraint(with_constraint("projected"), started, statistics("bert"), task="topic")
    peft_model = attach(model, started)
    trained = [p for n, p in peft_model.named_parameters() if p.requires_grad and ".lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    remove = attach_constraint(optimizer, peft_model, constraint)
    assert in_span(detach(peft_model, started, {}), constraint) < 1e-6
    g = torch.Generator().manual_seed(0)
    before = detach(peft_model, started, {})
    for _ in range(1000):
        for p in trained:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    after = detach(peft_model, started, {})
    assert in_span(after, constraint) < 1e-5
    assert all((after.modules[m].A - before.modules[m].A).norm() > 0.1 for m in after.modules)
    remove()
    for p in trained:
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()
    assert in_span(detach(peft_model, started, {}), constraint) > 1e-4


def test_penalty_is_added_once_a_step_in_a_plain_loop_with_accumulation(tiny_base, statistics):
    base, task = tiny_base("bert"), make_task()
    results = []
    for passes in (1, 4):
        model = load_task_model(base, task, seed=0)
        started = for_task(make_adapter(base, task, "bert"), task, model)
        started = dataclasses.replace(
            started, modules={n: LoraFactors(f.A, f.B + 0.1, f.scaling) for n, f in started.modules.items()}
        )
        constraint = prepare_constraint(with_constraint("penalised"), started, statistics("bert"), task="topic")
        peft_model = attach(model, started)
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        attach_constraint(optimizer, peft_model, constraint)
        for _ in range(passes):
            for p in trained:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        results.append(detach(peft_model, started, {}))
        assert penalty_of(results[-1], constraint) < penalty_of(started, constraint)
    for name, f in results[0].modules.items():
        assert torch.equal(f.A, results[1].modules[name].A)


@pytest.mark.parametrize("kind", [*OPTIONS, CURVED])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_fleet_equals_solo(tiny_base, statistics, tmp_path, kind, architecture):
    base = tiny_base(architecture)
    members = []
    for i, name in enumerate(("topic", "b", "topic")):
        task, settings = make_task(name), with_constraint(kind if i < 2 else "free")
        wanted = identity("train", {"constraint": settings.constraint}, seed=i)
        start = make_adapter(base, task, architecture, seed=i)
        members.append(
            Member(start, task, make_examples(task), settings, i, tmp_path / f"{i}", wanted, statistics(architecture))
        )
    fleet = train_fleet(members, base)
    for m, found in zip(members, fleet, strict=True):
        alone = train_adapter(
            m.initial, m.task, m.examples, base, m.settings, seed=m.seed, out=tmp_path / f"alone{m.seed}",
            identity=m.identity, statistics=m.statistics,
        )  # fmt: skip
        for name, f in found.modules.items():
            x, y = f.delta(), alone.modules[name].delta()
            assert (x - y).norm() < 1e-4 * y.norm(), (m.seed, name)
        if m.settings.constraint == "frozen":
            assert all(torch.equal(f.A, m.initial.modules[n].A) for n, f in found.modules.items())
            assert all(torch.equal(f.A, m.initial.modules[n].A) for n, f in alone.modules.items())
        if m.settings.constraint == "projected":
            rule = prepare_constraint(m.settings, m.initial, m.statistics, task=m.task.name)
            assert in_span(found, rule) < 1e-5 and in_span(alone, rule) < 1e-5


@pytest.mark.parametrize("constraint", ["frozen", "projected", "penalised"])
@pytest.mark.parametrize(("kind", "architecture"), [("regression", "bert"), ("causal", "llama"), ("seq2seq", "t5")])
def test_fleet_equals_solo_for_every_kind_of_task(tiny_base, tmp_path, kind, architecture, constraint):
    base, tokenizer, known = tiny_base(architecture), load_tokenizer(tiny_base(architecture)), {}
    # What T5's decoder reads in its first layer, two answers of two words, spans too few directions for a projection.
    targets = r".*encoder\..*\.(q|v)" if architecture == "t5" else TARGETS[architecture]
    for i, name in enumerate(("topic", "b")):
        task = make_task(name, kind)
        rows = encode(tokenizer, task, make_examples(task, 40, seed=10 + i), 24)
        model = load_task_model(base, task, seed=0)
        known[name] = collect_statistics(model, batches(tokenizer, rows, 8), targets)
    members = []
    for i, name in enumerate(("topic", "b")):
        task, settings = make_task(name, kind), dataclasses.replace(with_constraint(constraint), steps=8)
        start, wanted = make_adapter(base, task, architecture, seed=i), identity("train", {"k": constraint}, seed=i)
        inside = {n: f for n, f in start.modules.items() if architecture != "t5" or "encoder." in n}
        start = dataclasses.replace(start, modules=inside)
        members.append(Member(start, task, make_examples(task), settings, i, tmp_path / f"{i}", wanted, known))
    for m, found in zip(members, train_fleet(members, base), strict=True):
        alone = train_adapter(
            m.initial, m.task, m.examples, base, m.settings, seed=m.seed, out=tmp_path / f"alone{m.seed}",
            identity=m.identity, statistics=m.statistics,
        )  # fmt: skip
        moved = 0.0
        for name, f in found.modules.items():
            x, y = f.delta(), alone.modules[name].delta()
            assert (x - y).norm() < 1e-4 * y.norm() + 1e-7, (m.seed, name)
            moved += float(y.norm())
        assert moved > 0.01


@pytest.mark.parametrize("fleet", [False, True])
def test_mixed_precision_stays_in_the_span(tiny_base, statistics, tmp_path, fleet):
    base, task, known = tiny_base("llama"), make_task(), statistics("llama")
    settings = dataclasses.replace(with_constraint("projected"), precision="bf16")
    start, wanted = make_adapter(base, task, "llama"), identity("train", {"fleet": fleet})
    m = Member(start, task, make_examples(task), settings, 0, tmp_path / "a", wanted, known)
    if fleet:
        found = train_fleet([m, dataclasses.replace(m, seed=1, out=tmp_path / "b")], base)[0]
    else:
        found = train_adapter(
            start, task, m.examples, base, settings, seed=0, out=m.out, identity=wanted, statistics=known
        )
    assert in_span(found, prepare_constraint(settings, start, known, task="topic")) < 1e-5
    assert all(f.A.dtype == torch.float32 and f.B.any() for f in found.modules.values())


def test_a_penalty_keeps_the_shift_on_other_tasks_small(tiny_base, statistics, tmp_path):
    base, task = tiny_base("bert"), make_task()
    shifts = {}
    for beta in (0.0001, 100.0):
        settings = dataclasses.replace(SETTINGS, constraint="penalised", constraint_options={"beta": beta})
        start = make_adapter(base, task, "bert")
        trained = train_adapter(
            start, task, make_examples(task), base, settings, seed=0, out=tmp_path / str(beta),
            identity=identity("train", {"beta": beta}), statistics=statistics("bert"),
        )  # fmt: skip
        unit = prepare_constraint(with_constraint("penalised"), start, statistics("bert"), task="topic")
        shifts[beta] = penalty_of(trained, unit)
    assert shifts[100.0] < 0.3 * shifts[0.0001]


def test_what_cannot_be_prepared_is_named(tiny_base, statistics):
    start = make_adapter(tiny_base("bert"), make_task(), "bert")
    known = statistics("bert")
    with pytest.raises(UsageError, match="needs statistics"):
        prepare_constraint(with_constraint("projected"), start, {"topic": known["topic"]}, task="topic")
    with pytest.raises(UsageError, match="m is 99"):
        wide = dataclasses.replace(SETTINGS, constraint="projected", constraint_options={"m": 99})
        prepare_constraint(wide, start, known, task="topic")
    with pytest.raises(UsageError, match="no option"):
        odd = dataclasses.replace(SETTINGS, constraint="frozen", constraint_options={"m": 9})
        prepare_constraint(odd, start, known, task="topic")
    with pytest.raises(InputError, match="no LoRA layer"):
        model = attach(load_task_model(tiny_base("bert"), make_task(), seed=0), start)
        attach_constraint(
            torch.optim.SGD([torch.zeros(1)]), model, Constraint("projected", {"nowhere": Rule(torch.eye(2))})
        )


def test_a_module_of_two_towers_is_not_taken_for_the_first():
    from peft import LoraConfig, get_peft_model

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(4, 4)

    towers = torch.nn.ModuleDict({"image": Tower(), "text": Tower()})
    model = get_peft_model(towers, LoraConfig(r=2, target_modules=["q"]))
    for module, said in (("q", "is one of several: .*image.q, .*text.q"), ("k", "has no LoRA layer")):
        with pytest.raises(InputError, match=f"the constraint's module {said}"):
            cells_of(model, Constraint("penalised", {module: Rule(torch.eye(4), 1.0)}))
    (cell,) = cells_of(model, Constraint("penalised", {"text.q": Rule(torch.eye(4), 1.0)}))
    assert cell.A_gradient is model.get_submodule("base_model.model.text.q").lora_A["default"].weight
