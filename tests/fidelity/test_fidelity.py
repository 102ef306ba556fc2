"""Fidelity: 1 for the adapter itself, 0 for the base, less for more damage; every kind of model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.border.records import from_json, to_json
from plait.errors import InputError, UsageError
from plait.fidelity.measure import Closeness, Fidelity, closeness, task_fidelity
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.record import FidelityRecord
from plait.fidelity.score import fidelities, general_shift
from plait.fidelity.shift import hidden_shift
from plait.fidelity.tokens import encoded, require_room
from plait.model.applied import applied
from plait.model.base import head_state
from plait.tasks import collate
from tests.panels import random_adapter, texts_of

MODELS = [("bert", "classification"), ("mpnet", "classification"), ("t5", "classification"), ("llama", "classification"),
          ("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq")]  # fmt: skip


def of_task(fidelity, name):
    return next(t for t in fidelity.tasks if t.task == name)


def damaged(adapter, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    modules = {
        m: LoraFactors(f.A, f.B + torch.randn(f.B.shape, generator=g) * size, f.scaling)
        for m, f in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def test_an_adapter_that_does_not_fit_is_refused_whatever_is_asked_first(make_panel):
    panel = make_panel(general=texts_of(6, 9))
    adapter = panel.parts[0].adapter
    name, f = next(iter(adapter.modules.items()))
    wide = replace(adapter, modules={name: replace(f, A=torch.cat([f.A, f.A], 1))})
    other = Panel(
        panel.base, [replace(panel.parts[0], adapter=wide)], {"one": panel.texts["one"]}, general=panel.general
    )
    for asked in (general_shift, fidelities):
        with pytest.raises(InputError, match="is this adapter of another base"):
            asked(other, [(None, 1.0)])


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_general_texts_are_asked_with_the_heads_in_place_whatever_was_asked_before(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, general=texts_of(6, 9))
    merges = [(None, 1.0), (damaged(panel.parts[0].adapter, 1.6), 1.0)]
    first = general_shift(panel, merges)
    assert first[0] == pytest.approx(0, abs=1e-6) and first[1] > 1e-5
    assert [f.general_kl for f in fidelities(panel, merges)] == pytest.approx(list(first), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("architecture", "kind"), MODELS)
def test_an_adapter_keeps_all_of_itself_and_less_under_more_damage(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, general=texts_of(6, 9))
    own = panel.parts[0].adapter
    merges = [(own, 1.0), (None, 1.0), (own, 0.0), *((damaged(own, s), 1.0) for s in (0.1, 0.4, 1.6))]
    same, bare, zero, *worse = fidelities(panel, merges)
    mine = of_task(same, "one")
    assert mine.kl == pytest.approx(0, abs=1e-6)
    assert mine.agreement == 1.0
    assert mine.kept == pytest.approx(1, abs=1e-4) and mine.kept_agreement == 1.0
    for found in (of_task(bare, "one"), of_task(zero, "one")):
        assert found.kl == pytest.approx(found.kl_base, rel=1e-4) and found.kl > 0
        assert found.kept == pytest.approx(0, abs=1e-4)
    kls = [mine.kl, *(of_task(w, "one").kl for w in worse)]
    assert kls == sorted(kls) and kls[1] > 1e-6
    assert bare.general_kl == pytest.approx(0, abs=1e-6)
    assert same.general_kl > 1e-5
    assert [t.kept for t in same.tasks] == sorted(t.kept for t in same.tasks)
    assert same.worst.task == "two"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_text_is_compared_at_every_real_position(make_panel, architecture):
    """Against the definition, one text at a time, without pads."""
    panel = make_panel(architecture, "causal", texts=7)
    one, two = panel.parts
    model, rows = panel.model(one), encoded(panel, "causal", panel.texts["one"])
    kl, agree, n = 0.0, 0, 0
    mine, theirs, given, capped, spread = Counter(), Counter(), 0.0, 0.0, 0.0
    for row in rows:
        batch = collate(panel.tokenizer, [row])
        logs = []
        for worn in (one.adapter, two.adapter):
            with torch.no_grad(), applied(model, worn, 0.7 if worn is two.adapter else 1.0):
                logs.append(model(**batch).logits[0].log_softmax(-1))
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        agree += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        n += len(row["input_ids"])
        mine.update(logs[0].argmax(-1).tolist())
        theirs.update(logs[1].argmax(-1).tolist())
        chosen = logs[1].exp().gather(1, logs[0].argmax(-1, keepdim=True))
        capped += float(chosen.minimum(logs[0].exp().amax(-1, keepdim=True)).sum())
        given += float(chosen.sum())
        spread = spread + logs[1].exp().sum(0)
    found = of_task(fidelities(panel, [(two.adapter, 0.7)])[0], "one")
    assert found.n == n
    assert found.chance == pytest.approx(sum(mine[t] * theirs[t] for t in mine) / n**2, abs=1e-6)
    assert found.probability == pytest.approx(given / n, rel=1e-4)
    assert found.capped == pytest.approx(capped / n, rel=1e-4) and found.capped < found.probability
    assert found.probability_chance == pytest.approx(float(sum(mine[t] * spread[t] for t in mine)) / n**2, rel=1e-4)
    assert found.kl == pytest.approx(kl / n, rel=1e-3)
    assert found.agreement == pytest.approx(agree / n, abs=1e-6)


def test_regressions_are_compared_by_difference_and_correlation():
    own = np.array([[1.0], [2.0], [3.0], [4.0]])
    assert closeness("regression", own, own) == Closeness(0.0, 1.0, 0.0, 1.0, 0.0, capped=1.0)
    twice = closeness("regression", own, own * 2)
    assert twice.agreement == pytest.approx(1.0) and twice.kl == pytest.approx(0.5 * 7.5 / 1.25)
    assert closeness("regression", own, -own).agreement == 0.0


def test_probabilities_tell_merges_apart_that_choose_alike():
    rng = np.random.default_rng(1)
    own = rng.standard_normal((50, 3))
    base = Closeness(1.0, 0.0, 0.0, 0.0, 0.0)
    faint, same, firm, random = (
        task_fidelity("x", closeness("classification", own, x), base, 50)
        for x in (own * 0.3, own, own * 3.0, rng.standard_normal((50, 3)))
    )
    assert faint.beyond_chance == firm.beyond_chance == 1.0
    assert 0 < faint.followed < same.followed < 1
    # Nobody follows an adapter further than it does itself, however sure of its answers.
    assert firm.probability > same.probability == same.capped == pytest.approx(firm.capped)
    assert faint.followed < firm.followed < same.followed
    assert abs(random.followed) < 0.2
    q = softmax(own * 0.3)
    top = own.argmax(1)
    assert faint.probability == pytest.approx(q[range(50), top].mean())
    assert faint.probability_chance == pytest.approx(np.mean([q[:, c].mean() for c in top]))
    assert faint.capped == pytest.approx(np.minimum(q[range(50), top], softmax(own)[range(50), top]).mean())
    assert faint.followed == pytest.approx((faint.capped - faint.probability_chance) / (1 - faint.probability_chance))
    earlier = replace(firm, capped=None)
    assert earlier.followed == pytest.approx(
        (firm.probability - firm.probability_chance) / (1 - firm.probability_chance)
    )
    assert Fidelity.of([faint, firm]).score == pytest.approx((faint.followed + firm.followed) / 2)


def test_a_merge_that_exaggerates_is_not_closer_than_one_that_repeats():
    """An unsure adapter, a merge near it, and one that is thrice as sure and answers a fifth of the rows otherwise."""
    rng = np.random.default_rng(4)
    own = rng.standard_normal((200, 8)) * 0.7
    near = own + rng.standard_normal(own.shape) * 0.1
    loud = own * 3.0
    loud[:40] = rng.standard_normal((40, 8)) * 2.1
    base = Closeness(1.0, 0.0, 0.0, 0.0, 0.0)
    repeats, exaggerates = (task_fidelity("x", closeness("classification", own, x), base, 200) for x in (near, loud))
    assert repeats.kl < exaggerates.kl and repeats.agreement > exaggerates.agreement
    assert repeats.probability < exaggerates.probability
    assert repeats.followed > exaggerates.followed


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def of_classes(own, found):
    """Fidelity of predicted classes."""
    c = closeness("classification", np.eye(3)[np.array(own)], np.eye(3)[np.array(found)])
    return task_fidelity("x", c, Closeness(1.0, 0.0, 0.0, 0.0, 0.0), len(own))


def test_agreement_beyond_chance_is_cohens_kappa():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        own, found = rng.choice(3, 40, p=(0.7, 0.2, 0.1)), rng.choice(3, 40, p=(0.5, 0.2, 0.3))
        found = np.where(rng.random(40) < 0.5, own, found)
        assert of_classes(own, found).beyond_chance == pytest.approx(cohen_kappa_score(own, found))


def test_a_collapsed_merge_agrees_by_chance_only():
    own = [0] * 9 + [1]
    collapsed, mistaken = of_classes(own, [0] * 10), of_classes(own, [0] * 7 + [1] * 3)
    assert collapsed.agreement == 0.9 > mistaken.agreement == 0.8
    assert collapsed.beyond_chance == 0.0 < mistaken.beyond_chance
    assert of_classes(own, own).beyond_chance == 1.0
    assert of_classes([1] * 7, [1] * 7).beyond_chance == of_classes([1] * 7, [0] * 7).beyond_chance == 0.0


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_hidden_states_shift_from_nothing_to_the_base(make_panel, architecture, kind):
    panel = make_panel(architecture, kind)
    part = panel.parts[0]

    def times(factor: float) -> Adapter:
        return replace(part.adapter, modules={m: replace(f, B=f.B * factor) for m, f in part.adapter.modules.items()})

    same, half, none = (hidden_shift(panel, part, times(s)) for s in (1.0, 0.5, 0.0))
    assert len(same) >= 2
    assert max(same) < 1e-4
    assert all(0 < h < 1 for h in half)
    assert none == pytest.approx([1.0] * len(none), rel=1e-4)
    still = replace(part, adapter=times(0.0))  # nothing that a shift would be measured in
    assert set(hidden_shift(panel, still, part.adapter)) == {0.0}


def test_what_cannot_be_compared_is_named(tiny_base):
    base = tiny_base("bert")
    one = random_adapter(base, "bert", "one", "classification", 1)
    with pytest.raises(InputError, match="makes no predictions"):
        parts_of([replace(one, heads={}, task_type="FEATURE_EXTRACTION")])
    with pytest.raises(UsageError, match="two adapters bring a task"):
        parts_of([one, one])
    with pytest.raises(UsageError, match="no texts for one"):
        Panel(base, parts_of([one]), {})
    with pytest.raises(UsageError, match="did you mean 'one'"):
        Panel(base, parts_of([one]), {"onee": texts_of(3)})
    small = replace(one, heads={"one": {k: v for k, v in one.heads["one"].items() if "bias" not in k}})
    with pytest.raises(InputError, match="head tensor is absent"):
        fidelities(Panel(base, parts_of([small]), {"one": texts_of(3)}), [(None, 1.0)])


def test_a_part_has_its_head_whoever_asked_for_the_model_first(make_panel):
    """The check of positions asks for the tasks' models, whose heads hold no values yet."""
    panel = make_panel()
    require_room(panel)
    for part in panel.parts:
        found = head_state(panel.model(part))
        assert found.keys() == part.head.keys()
        assert all(torch.equal(found[k].cpu(), v) for k, v in part.head.items())


def test_a_record_of_an_earlier_version_says_what_the_names_mean_now(make_panel):
    """Of one adapter `followed` was the mean of two things once; before that some of what it is made of was not there."""
    panel = make_panel()
    other = panel.parts[1].adapter
    now = FidelityRecord.of(fidelities(panel, [(other, 0.5)])[0])
    written = to_json(now)
    assert to_json(from_json(FidelityRecord, written)) == written
    for task in written["tasks"]:
        task["followed"], task["kept"] = 0.123, 0.456
    assert to_json(from_json(FidelityRecord, written)) == to_json(now)
    assert now.score == pytest.approx(np.mean([t.followed for t in now.tasks]))
    written["tasks"][0] |= {"of_later_versions": 1}
    assert from_json(FidelityRecord, written).tasks[0].fidelity == now.tasks[0].fidelity
    del written["tasks"][0]["probability"]
    early = from_json(FidelityRecord, written).tasks[0]
    assert early.followed == 0.123
    with pytest.raises(InputError, match="says nothing of its probability"):
        _ = early.fidelity
