"""Heads fitted to the merged model's features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.choosing.auto import AutoSettings, merge_auto
from plait.choosing.choose import scaled
from plait.fidelity.score import fidelities, outputs
from plait.learning.head_learning import weights_and_heads, with_learnt_heads
from plait.learning.heads import Last, refit_heads
from plait.merging import merge


def adapters_of(panel):
    return [p.adapter for p in panel.parts]


@pytest.fixture
def panel(make_panel):
    return make_panel(texts=40)


def merged(panel, scale=0.5):
    return scaled(merge(adapters_of(panel), "task_arithmetic", scale=1.0).adapter, scale)


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_the_fit_is_the_minimum_of_its_ridge_problem(strength):
    """Its gradient, by autograd, is zero: 2 (V Z^T - Y^T) Z + 2 k (V - V_0)."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    last = Last("out", draw(3, 9), draw(12, 9), draw(12, 3))
    rows = torch.arange(10)
    V = last.refit(strength, rows).requires_grad_()
    Z = last.features[rows]
    level = strength * Z.square().sum() / Z.shape[1]
    loss = (Z @ V.T - last.wanted[rows]).square().sum() + level * (V - last.weights).square().sum()
    (slope,) = torch.autograd.grad(loss, V)
    assert float(slope.abs().max()) < 1e-9 * float(loss.detach())
    far = last.refit(1e12, rows)
    torch.testing.assert_close(far, last.weights, atol=1e-9, rtol=1e-9)


def test_a_head_that_is_kept_is_closer_on_held_out_texts_and_only_its_last_layer_moves(panel):
    merge = merged(panel)
    done, records = refit_heads(panel, merge)
    assert [r.task for r in records] == ["one", "two"] and any(r.kept for r in records)
    assert all(torch.equal(f.A, merge.modules[m].A) for m, f in done.modules.items())
    for part, record in zip(panel.parts, records, strict=True):
        assert record.kept == (record.after < record.before)
        changed = {k for k, t in done.heads[part.name].items() if not torch.equal(t, part.head[k])}
        assert changed == ({"classifier.weight", "classifier.bias"} if record.kept else set())


def test_the_record_is_what_the_models_answer_on_the_texts_held_out(panel):
    """The same fit by hand: learnt from three quarters, read through the evaluator on the fourth."""
    merge = merged(panel)
    _, records = refit_heads(panel, merge)
    rest = panel.with_texts({t: rows[3::4] for t, rows in panel.texts.items()})
    tasks = {t.task: t for t in fidelities(rest, [(merge, 1.0)])[0].tasks}
    for record in records:
        if record.task == "one":  # the variance by which a regression's KL is divided is that of the rows
            assert record.before == pytest.approx(tasks[record.task].kl, rel=1e-4)
    part = panel.parts[0]
    done, _ = refit_heads(panel, merge)
    own, before, after = outputs(panel, part, [(part.adapter, 1.0), (merge, 1.0), (done, 1.0)])
    if records[0].kept:
        assert np.square(after - own).mean() < np.square(before - own).mean()


def test_a_merge_that_is_the_adapter_keeps_its_head(panel):
    part = panel.parts[0]
    alone = replace(panel, parts=[part], texts={part.name: panel.texts[part.name]}, _own=None, _placed=set())
    done, records = refit_heads(alone, part.adapter)
    assert records[0].before == pytest.approx(0.0, abs=1e-9)
    for name, tensor in done.heads[part.name].items():
        torch.testing.assert_close(tensor, part.head[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [True, False])
def test_auto_writes_heads_that_follow(panel, heads):
    settings = AutoSettings(methods=("tsv",), scales=(0.5,), refine=0, fit=False, heads=heads)
    found = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=settings)
    kept = [h.task for h in found.record.heads if h.kept]
    moved = [
        p.name
        for p in panel.parts
        if any(not torch.equal(t, p.head[k]) for k, t in found.adapter.heads[p.name].items())
    ]
    assert moved == kept and bool(kept) == heads and bool(found.record.heads) == heads


def test_a_head_that_answers_at_every_position_is_read_where_its_answer_is_taken(make_panel):
    """Llama's classifier scores every token and takes the last real one."""
    panel = make_panel("llama", "classification", texts=16)
    merge = merged(panel)
    _, records = refit_heads(panel, merge)
    rest = panel.with_texts({t: rows[3::4] for t, rows in panel.texts.items()})
    tasks = {t.task: t for t in fidelities(rest, [(merge, 1.0)])[0].tasks}
    assert records[0].before == pytest.approx(tasks["one"].kl, rel=1e-3)


def test_learnt_heads_are_closer_on_held_out_texts_or_left(panel):
    merge = merged(panel)
    done, seen = with_learnt_heads(panel, merge, {}, steps=60)
    assert seen.kept and seen.held_out["learnt"] > max(seen.held_out["merge"], seen.held_out["fitted"])
    for part in panel.parts:
        assert done.heads[part.name].keys() == part.head.keys()
        assert all(t.dtype == part.head[k].dtype and not t.requires_grad for k, t in done.heads[part.name].items())
        assert any(not torch.equal(t, part.head[k]) for k, t in done.heads[part.name].items())
    before, after = fidelities(panel, [(merge, 1.0), (done, 1.0)])
    assert after.score > before.score
    assert any(
        f.scaling != merge.modules[m].scaling or not torch.equal(f.B, merge.modules[m].B)
        for m, f in done.modules.items()
    )
    assert all(torch.equal(f.A, merge.modules[m].folded().A) for m, f in done.modules.items())
    one = adapters_of(panel)[0]  # its own answers are its own: nothing comes closer
    alone = replace(panel, parts=panel.parts[:1], texts={"one": panel.texts["one"]}, _own=None)
    same, seen = with_learnt_heads(alone, one, {}, steps=5)
    assert same is one and not seen.kept


def test_weights_of_each_adapter_are_learnt_with_the_heads(panel):
    merge = merged(panel)
    ranks = {m: [a.modules[m].rank for a in adapters_of(panel)] for m in merge.modules}
    done = weights_and_heads(panel, merge, ranks, steps=10, seed=0)
    apart = []
    for m, f in done.modules.items():
        before = merge.modules[m].folded().B
        ratio = (f.B / before).nanmedian(0).values
        groups = torch.split(ratio, ranks[m])
        assert all(float(g.max() - g.min()) < 1e-4 for g in groups)
        apart.append(abs(float(groups[0][0] - groups[1][0])))
    assert max(apart) > 1e-3


def test_auto_learns_heads_by_option_and_says_so(panel):
    settings = AutoSettings(("task_arithmetic",), (0.3, 0.7), refine=0, fit=False, max_length=24)
    given = (adapters_of(panel), panel.base, panel.texts)
    plain, learnt = (merge_auto(*given, settings=replace(settings, learn_heads=on)) for on in (False, True))
    assert plain.record.learnt_heads is None and learnt.record.learnt_heads.steps == 100
    assert learnt.record.learnt_heads.kept and not learnt.record.heads
    assert learnt.fidelity.score > plain.fidelity.score
