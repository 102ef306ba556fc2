"""What a constraint is prepared from: statistics as read, opened, compressed; and what they must not be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.errors import InputError, UsageError
from plait.model.base import load_task_model, load_tokenizer
from plait.statistics import collect_statistics, merge_statistics, open_statistics, write_statistics
from plait.statistics.sketch import compress_statistics
from plait.tasks import batches, encode
from plait.training import TrainingSettings, attach_constraint, prepare_constraint
from plait.training.peft_model import attach, detach, for_task
from tests.tiny import TARGETS, make_adapter, make_examples, make_task

PENALISED = TrainingSettings(steps=1, constraint="penalised")


@pytest.fixture(scope="module")
def given(tiny_base):
    """An adapter and the statistics of its task and of two others."""
    base, found = tiny_base("bert"), {}
    for i, name in enumerate(("topic", "b", "c")):
        task = make_task(name)
        rows = encode(load_tokenizer(base), task, make_examples(task, 40, seed=10 + i), 24)
        passed = batches(load_tokenizer(base), rows, 8)
        model = load_task_model(base, task, seed=0)
        found[name] = collect_statistics(model, passed, TARGETS["bert"], provenance={"task": name})
    return make_adapter(base, make_task(), "bert"), found


def test_the_penalty_is_the_relative_shift_of_the_others_outputs(given):
    start, known = given
    rules = prepare_constraint(PENALISED, start, known, task="topic").rules
    assert list(rules) == list(start.modules)
    for module, rule in rules.items():
        info = known["b"].modules[module]
        m = sum(known[t].sites[info.site].dense().double() / known[t].sites[info.site].trace for t in ("b", "c")) / 2
        energy = sum(known[t].modules[module].output_energy / known[t].sites[info.site].trace for t in ("b", "c")) / 2
        torch.testing.assert_close(rule.matrix.double(), m, rtol=1e-5, atol=1e-8)
        assert rule.weight == pytest.approx(1 / energy)


def test_statistics_that_stay_in_their_files_give_the_same_bits(given, tmp_path):
    start, known = given
    opened = {}
    for name, statistics in known.items():
        write_statistics(tmp_path / name, statistics)
        opened[name] = open_statistics(tmp_path / name)
    read, lazy = (prepare_constraint(PENALISED, start, s, task="topic").rules for s in (known, opened))
    assert all(torch.equal(read[m].matrix, lazy[m].matrix) and read[m].weight == lazy[m].weight for m in read)


@pytest.mark.parametrize("tail", [False, True])
def test_a_sketch_changes_the_penalty_within_its_bound(given, tail):
    start, known = given
    small = {t: compress_statistics(s, 3, tail=tail) for t, s in known.items()}
    assert all(m.sketched for s in small.values() for m in s.sites.values())
    exact, coarse = (prepare_constraint(PENALISED, start, s, task="topic").rules for s in (known, small))
    for module, rule in exact.items():
        site = known["b"].modules[module].site
        bound = sum(small[t].sites[site].error / small[t].sites[site].trace for t in ("b", "c")) / 2
        lost = float(torch.linalg.eigvalsh((rule.matrix - coarse[module].matrix).double()).abs().max())
        assert 0 < lost <= 1.001 * bound < float(torch.linalg.eigvalsh(rule.matrix.double()).max())
        assert coarse[module].weight == pytest.approx(rule.weight, rel=1e-4)


def test_what_does_not_belong_together_is_refused(given):
    start, known = given
    pool = {"topic": known["topic"], "pool": merge_statistics(known["topic"], known["b"])}
    with pytest.raises(UsageError, match="'pool' were merged from files of 'topic' too"):
        prepare_constraint(PENALISED, start, pool, task="topic")
    elsewhere = dataclasses.replace(known["b"], provenance={"task": "b", "base": "another"})
    mine = dataclasses.replace(known["topic"], provenance={"task": "topic", "base": "this"})
    with pytest.raises(InputError, match="differ in base"):
        prepare_constraint(PENALISED, start, {"topic": mine, "b": elsewhere}, task="topic")
    more = dataclasses.replace(start, modules={**start.modules, "pooler.dense": next(iter(start.modules.values()))})
    with pytest.raises(InputError, match=r"nothing of pooler\.dense"):
        prepare_constraint(PENALISED, more, known, task="topic")
    wide = {m: dataclasses.replace(f, A=torch.zeros(f.A.shape[0], f.A.shape[1] + 1)) for m, f in start.modules.items()}
    with pytest.raises(InputError, match=r"reads \d+ numbers, its statistics are of"):
        prepare_constraint(PENALISED, dataclasses.replace(start, modules=wide), known, task="topic")
    with pytest.raises(UsageError, match=r"given are those of b, c .*--statistics FILE"):
        prepare_constraint(PENALISED, start, {t: known[t] for t in ("b", "c")}, task="topic")
    dead = {m: dataclasses.replace(i, output_energy=0.0) for m, i in known["b"].modules.items()}
    silent = {"topic": known["topic"], "b": dataclasses.replace(known["b"], modules=dead)}
    with pytest.raises(InputError, match="are zero"):
        prepare_constraint(PENALISED, start, silent, task="topic")


@pytest.mark.parametrize(("constraint", "options"), [("penalised", {}), ("projected", {"m": 6})])
def test_factors_in_bfloat16_are_kept_too(tiny_base, given, constraint, options):
    start, known = given  # TRL trains them so on a base in 4 bits
    model = load_task_model(tiny_base("bert"), make_task(), seed=0)
    start = for_task(start, make_task(), model)
    start = dataclasses.replace(
        start, modules={n: LoraFactors(f.A, f.B + 0.1, f.scaling) for n, f in start.modules.items()}
    )
    settings = TrainingSettings(steps=1, constraint=constraint, constraint_options=options)
    rules = prepare_constraint(settings, start, known, task="topic")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        peft_model = attach(load_task_model(tiny_base("bert"), make_task(), seed=0), start)
        trained = [p for n, p in peft_model.named_parameters() if ".lora_" in n]
        for p in trained:
            p.data = p.data.to(dtype)
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(trained, lr=0.05)
        attach_constraint(optimizer, peft_model, rules)
        optimizer.step()
        found[dtype] = detach(peft_model, start, {})
    for module, f in found[torch.float32].modules.items():
        rough = found[torch.bfloat16].modules[module]
        assert not torch.equal(f.delta(), start.modules[module].delta())
        assert (f.delta() - rough.delta().float()).norm() < 0.02 * f.delta().norm()
