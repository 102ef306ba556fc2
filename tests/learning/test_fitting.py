"""A chosen merge fitted front to back on the adapters' texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plait.choosing.auto import AutoSettings, merge_auto
from plait.choosing.choose import scaled
from plait.fidelity.score import fidelities
from plait.learning.fitting import SCALES, TRIED, Fit, best_fit, can_fit, fitted
from plait.merging import merge

FIT = Fit(0.01, 1.0, 1.0)


def adapters_of(panel):
    return [p.adapter for p in panel.parts]


def close(a, b, tolerance=1e-4):
    return all(
        float((a.modules[m].delta() - f.delta()).abs().max()) <= tolerance * float(f.delta().abs().max())
        for m, f in b.modules.items()
    )


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_the_fit_is_closer_to_the_adapters_than_the_merge(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=24)
    start = scaled(merge(adapters_of(panel), "task_arithmetic", scale=1.0).adapter, 0.5)
    done = fitted(panel, adapters_of(panel), start, FIT)
    before, after = fidelities(panel, [(start, 1.0), (done, 1.0)])
    assert after.kept > before.kept and after.score > before.score
    assert done.modules.keys() == start.modules.keys() and done.rank == start.rank


def test_neither_padding_nor_the_size_of_a_batch_matters(make_panel):
    panel = make_panel(texts=9)
    start = merge(adapters_of(panel), "tsv").adapter
    one, many = (
        fitted(replace(panel, batch_size=n, _own=None, _placed=set()), adapters_of(panel), start, FIT) for n in (1, 9)
    )
    assert close(one, many)


def test_a_rank_is_that_of_the_fit_and_scale_multiplies_it(make_panel):
    panel = make_panel(texts=9)
    start = merge(adapters_of(panel), "tsv").adapter
    done = fitted(panel, adapters_of(panel), start, FIT, rank=2)
    assert done.rank == 2
    longer = fitted(panel, adapters_of(panel), start, replace(FIT, scale=1.5), rank=2)
    assert close(longer, scaled(done, 1.5))


def test_the_best_fit_is_the_best_of_all_on_the_texts_held_out(make_panel):
    panel = make_panel(texts=16)
    start = merge(adapters_of(panel), "tsv").adapter
    fit, score = best_fit(panel, adapters_of(panel), start)
    assert fit.scale in SCALES and (fit.pull, fit.reach) in [(p, float(f"{2**r:.3g}")) for p, r in TRIED]
    most = {t: tuple(x for i, x in enumerate(rows) if i % 4 != 3) for t, rows in panel.texts.items()}
    rest = {t: rows[3::4] for t, rows in panel.texts.items()}
    again = fitted(panel.with_texts(most), adapters_of(panel), start, fit)
    assert fidelities(panel.with_texts(rest), [(again, 1.0)])[0].score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("fit", [True, False])
def test_auto_keeps_what_is_closest_on_held_out_texts(make_panel, fit):
    panel = make_panel(texts=16)
    settings = AutoSettings(methods=("tsv",), scales=(0.5, 0.9), refine=2, fit=fit, rank=3)
    found = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=settings)
    held, chosen = found.record.held_out, found.record.chosen
    assert set(held) == {"chosen", "refined", *(["cut", "fitted"] if fit else [])}
    assert (chosen.fit is not None) == (fit and held["fitted"] > held["cut"])  # merges of one rank are compared
    assert found.adapter.rank <= 3
    if chosen.fit:
        assert not chosen.weights and found.record.loss.discarded_energy == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_be_fitted(make_panel):
    assert not can_fit(make_panel("t5", "seq2seq"))
    assert can_fit(make_panel())


def test_the_base_is_left_as_it_was(make_panel):
    panel = make_panel(texts=6)
    model = panel.model(panel.parts[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if "classifier" not in k}
    fitted(panel, adapters_of(panel), merge(adapters_of(panel), "tsv").adapter, FIT)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not any(m._forward_hooks for m in model.modules())
