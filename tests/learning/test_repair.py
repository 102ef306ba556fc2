"""Repair: distilling many adapters into one, its targets, and when it stops."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.choosing import finishing
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.counting import making
from plait.choosing.finishing import Midway
from plait.cli.existing_words import repair_text
from plait.fidelity.record import AutoRecord, Look, Repair
from plait.fidelity.score import fidelities
from plait.learning import repair
from plait.learning.distil import RATES, Distilled, Stopping, distil
from plait.learning.heads import refit_heads
from plait.learning.layers import spread, watched
from plait.learning.losses import loss_of
from plait.learning.targets import TopTargets
from plait.learning.text_teachers import TextLoss
from plait.merging import merge
from plait.model.applied import applied
from tests.panels import adapters_of, same


def kl_of(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The divergence, from its definition."""
    p, q = own.double().softmax(-1), other.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def test_kept_tokens_and_the_mass_of_the_rest_are_the_divergence_of_those_events():
    g = torch.Generator().manual_seed(0)
    own, other = 3 * torch.randn(5, 40, generator=g), 3 * torch.randn(5, 40, generator=g)
    whole = TopTargets.of(own, 40)
    assert torch.allclose(whole.kl(other).double(), kl_of(own, other), atol=1e-5)
    assert torch.allclose(whole.kl(own), torch.zeros(5), atol=1e-6)
    targets = TopTargets.of(own, 6)
    expected = []
    for a, b in zip(own.double(), other.double(), strict=True):
        top = a.topk(6).indices
        events = [torch.cat([x.softmax(-1)[top], 1 - x.softmax(-1)[top].sum()[None]]) for x in (a, b)]
        expected.append((events[0] * (events[0].log() - events[1].log())).sum())
    assert torch.allclose(targets.kl(other).double(), torch.stack(expected), atol=1e-5)
    assert bool((targets.kl(other) <= whole.kl(other) + 1e-6).all())
    # where the rest is shared out alike, nothing is lost
    alike = own.clone()
    alike.scatter_(1, targets.ids.long(), other.gather(1, targets.ids.long()))
    assert torch.allclose(targets.kl(alike).double(), kl_of(own, alike), atol=1e-5)


def test_gradients_of_kept_tokens_are_those_of_their_definition():
    g = torch.Generator().manual_seed(1)
    own = torch.randn(3, 12, generator=g)
    other = torch.randn(3, 12, generator=g).requires_grad_(True)
    targets = TopTargets.of(own, 4)
    targets.kl(other).sum().backward()
    mass = other.detach().softmax(-1)
    top = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, targets.ids.long(), True)
    # d KL / d logit: q - p at a kept token; q (1 - p_rest / q_rest) at one of the rest
    rest = (mass * ~top).sum(-1, keepdim=True)
    expected = torch.where(top, mass - own.softmax(-1), mass * (1 - targets.rest.exp()[:, None] / rest))
    assert torch.allclose(other.grad, expected, atol=1e-5)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_the_loss_of_layers_is_their_distance_over_the_bases(make_panel, architecture, kind):
    """Against the definition, one text at a time; 1 for the bare base, so that tasks weigh alike."""
    panel = make_panel(architecture, kind, texts=5)
    loss, without = loss_of(panel, 1.0), loss_of(panel)
    rows = [[3, 0], [1, 4]]
    model = panel.model(panel.parts[0])
    found = float(loss(rows, contextlib.nullcontext).detach()) - float(without(rows, contextlib.nullcontext).detach())
    expected = 0.0
    for part, chosen in zip(panel.parts, rows, strict=True):
        off, room = [], []
        for i, text in enumerate(panel.texts[part.name]):
            inputs = panel.tokenizer(text[0], truncation=True, max_length=panel.max_length, return_tensors="pt")
            states = []
            for active in (part.adapter, None):
                with torch.no_grad(), applied(model, active), watched(model) as seen:
                    panel.model(part)(**inputs)
                states.append(torch.stack([h[0] for h in seen]))
            distance = (states[0] - states[1]).square().sum(-1)  # (layers, positions)
            room.append(distance)
            off += [distance] if i in chosen else []
        expected += float((torch.cat(off, 1).mean(1) / torch.cat(room, 1).mean(1)).mean()) / 2
    assert found == pytest.approx(expected, rel=5e-3)  # kept in 16 bits


def test_layers_are_kept_as_far_as_there_is_room_the_last_always(make_panel, monkeypatch):
    from plait.learning import layers

    assert spread(30, 3) == [9, 19, 29]
    panel = make_panel("llama", "causal", texts=4)
    whole = TextLoss(panel, 1.0).taught[0].layers
    monkeypatch.setitem(layers.KEPT_BYTES, "cpu", 0)
    assert len(whole.layers) >= 2 and TextLoss(panel, 1.0).taught[0].layers is None


@pytest.mark.parametrize(
    ("repair_from", "texts", "tried"), [(20, 16, False), (20, 20, True), (24, 20, False), (0, 16, True)]
)
def test_a_repair_of_classifiers_wants_texts(make_panel, monkeypatch, repair_from, texts, tried):
    """With few texts a repair takes more than it gives (docs/results/existing-texts.md): `auto` tries none, a number is noted."""
    monkeypatch.setattr(finishing, "TEXTS_TO_REPAIR", 20)
    panel = make_panel(texts=texts)
    start = merge(adapters_of(panel), "tsv").adapter
    settings = AutoSettings(repair=2, repair_from=repair_from)
    record = finishing.finished(Midway(start, AutoRecord((), "base"), {}), panel, settings)[1]
    assert (record.repair is not None) == tried
    said = [n for n in record.notes if f"{texts} texts of {panel.names[0]}" in n]
    assert len(said) == (texts < max(repair_from, 20)) and all(
        n.startswith("a repair is tried" if tried else "no repair is") for n in said
    )


@pytest.mark.parametrize(("repair_from", "steps"), [(repair.TEXTS_TO_REPAIR, 0), (0, 4)])
def test_the_time_told_beforehand_counts_no_repair_that_is_not_tried(make_panel, repair_from, steps):
    panel = make_panel()
    assert making(panel, panel, AutoSettings(repair=4, repair_from=repair_from)).repaired == steps


def test_a_repair_of_text_models_may_have_few_texts(make_panel):
    panel = make_panel("llama", "causal", texts=16)
    start = merge(adapters_of(panel), "tsv").adapter
    settings = AutoSettings(repair=1, repair_from=repair.TEXTS_TO_REPAIR)
    record = finishing.finished(Midway(start, AutoRecord((), "base"), {}), panel, settings)[1]
    assert record.repair is not None and record.notes == ()


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_no_steps_change_nothing(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=4)
    merged = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    assert distil(panel, merged, learns="factors", steps=0).adapter is merged
    done, record = repair.repaired(panel, merged, 0)
    assert done is merged and (record.steps, record.kept, record.most) == (0, False, 0)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_one_adapter_distilled_into_itself_stays(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=12)
    part = panel.parts[0]
    alone = replace(panel, parts=[part], texts={part.name: panel.texts[part.name]})
    # Adam takes whole steps however small the gradient is: at the rate of a repair it would walk about its start.
    done = distil(alone, part.adapter, learns="factors", rate=RATES["factors"] / 10, steps=20, loss=loss_of(alone, 0.1))
    off = max(
        float((done.adapter.modules[m].delta() - f.delta()).norm() / f.delta().norm())
        for m, f in part.adapter.modules.items()
    )
    assert max(done.first_loss, done.last_loss) < 1e-3 and off < 1e-2


def test_how_two_factors_share_their_size_does_not_matter(make_panel):
    panel = make_panel("bert", "classification", texts=12)
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    modules = {m: LoraFactors(64 * f.A, f.B / 64, f.scaling, f.kind) for m, f in start.modules.items()}
    done = [
        distil(panel, a, learns="factors", steps=5).adapter.modules for a in (start, replace(start, modules=modules))
    ]
    assert all(torch.equal(f.delta(), done[1][m].delta()) for m, f in done[0].items())
    assert any(not torch.equal(f.delta(), start.modules[m].delta()) for m, f in done[0].items())


def test_the_rate_is_a_share_of_each_factor_and_rises_at_first(make_panel):
    panel = make_panel("bert", "classification", texts=12)
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    first = distil(panel, start, learns="factors", steps=100, rate=0.5, stopping=Stopping(lambda _: 0.0, 1, 0)).adapter
    for m, f in start.modules.items():
        before = f.folded()
        for old, new in ((before.A, first.modules[m].A), (before.B, first.modules[m].B)):
            step = float((new - old).abs().max())  # Adam's first step is the rate, whatever the gradient
            size = float(old.square().mean().sqrt())
            assert step == 0 or 0.5 / 10 / 1.5 <= step / size <= 0.5 / 10 * 1.5


def test_targets_are_computed_once(make_panel, monkeypatch):
    panel = make_panel("llama", "causal", texts=8)
    loss = loss_of(panel)
    from plait.learning import text_teachers

    monkeypatch.setattr(text_teachers, "applied", None)  # what wears an adapter: asking one again would fail
    assert float(loss([[0, 1], [2, 3]], contextlib.nullcontext).detach()) > 0


def test_it_stops_where_texts_held_out_see_no_more(make_panel):
    panel = make_panel(texts=8)
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    scores, seen = iter([0.1, 0.5, 0.4, 0.3, 0.9]), []

    def score(adapter: Adapter) -> float:
        seen.append(adapter)
        return next(scores)

    told: list[Look] = []
    stopping = Stopping(score, every=2, patience=2, on_look=told.append)
    done = distil(panel, start, learns="factors", steps=50, stopping=stopping)
    assert done.adapter is seen[1] and done.steps == 4
    assert done.looks == tuple(told) == (Look(2, 0.1), Look(4, 0.5), Look(6, 0.4), Look(8, 0.3))
    last = distil(panel, start, learns="factors", steps=3, stopping=Stopping(lambda _: 1.0, every=2))
    assert [look.step for look in last.looks] == [2, 3]  # the last step too


@pytest.mark.parametrize("better", [True, False])
def test_it_is_kept_only_where_texts_held_out_say_so(make_panel, monkeypatch, better):
    panel = make_panel(texts=16)
    adapters = adapters_of(panel)
    merges = [merge(adapters, "task_arithmetic", scale=s).adapter for s in (0.5, 30.0)]
    rest = panel.with_texts({t: rows[3::4] for t, rows in panel.texts.items()}, general=False)
    scores = [f.kept for f in fidelities(rest, [(m, 1.0) for m in merges])]
    near, far = merges[scores.index(max(scores))], merges[scores.index(min(scores))]
    start, end = (far, near) if better else (near, far)
    learnt_from = []

    def pretend(panel, _, *, stopping, **options):
        learnt_from.append({len(rows) for rows in panel.texts.values()})
        look = Look(5, stopping.score(end))
        stopping.on_look(look)
        return Distilled(end, 1.0, 0.5, {}, 5, (look,))

    monkeypatch.setattr(repair, "distil", pretend)
    said: list[str] = []
    done, record = repair.repaired(panel, start, 20, on_progress=said.append)
    assert learnt_from == [{12}]  # a quarter held out
    assert record.kept == better == (record.held_out["repaired"] > record.held_out["merge"])
    assert done is (end if better else start) and (record.steps, record.most) == (5, 20)
    assert (
        record.looks[0] == Look(0, record.held_out["merge"]) and "at most 20 steps" in said[-1] and "left" in said[-1]
    )


def test_a_repair_is_judged_by_the_divergence_that_it_learns_from(make_panel, monkeypatch):
    """A merge that is too sure of itself gives more probability to an adapter's answers than one that is closer to the adapter."""
    panel = make_panel(texts=16)
    adapters, scales = adapters_of(panel), (0.3, 0.6, 1.0, 1.5, 2.0, 4.0)
    merges = [merge(adapters, m, scale=s).adapter for m in ("task_arithmetic", "tsv", "ties", "iso_c") for s in scales]
    rest = panel.with_texts({t: rows[3::4] for t, rows in panel.texts.items()}, general=False)
    seen = [(f.kept, f.score, m) for f, m in zip(fidelities(rest, [(m, 1.0) for m in merges]), merges, strict=True)]
    start, end = next((a[2], b[2]) for a in seen for b in seen if a[0] < b[0] and a[1] > b[1])

    def pretend(*_, stopping, **options):
        return Distilled(end, 1.0, 0.5, {}, 5, (Look(5, stopping.score(end)),))

    monkeypatch.setattr(repair, "distil", pretend)
    done, record = repair.repaired(panel, start, 20)
    assert done is end and record.kept
    before, after = (record.held_out[k] for k in ("merge", "repaired"))
    assert f"closeness {before:.3f} -> {after:.3f} on held-out texts" in repair_text(record)
    assert f"closeness {before:.3f} -> {after:.3f}" in repair_text(replace(record, kept=False))


def test_a_repair_is_judged_with_the_heads_that_follow(make_panel, monkeypatch):
    """What random adapters say of some texts says nothing of others: every text is there four times."""
    panel = make_panel(texts=6)
    panel = replace(
        panel, texts={t: tuple(x for x in rows for _ in range(4)) for t, rows in panel.texts.items()}, _own=None
    )
    adapters, scales = adapters_of(panel), (0.1, 0.5, 1.0, 1.5)
    merges = [merge(adapters, m, scale=s).adapter for m in ("task_arithmetic", "tsv", "iso_c") for s in scales]
    rest = {t: rows[3::4] for t, rows in panel.texts.items()}
    most = {t: tuple(r for i, r in enumerate(rows) if i % 4 != 3) for t, rows in panel.texts.items()}
    with_heads = [refit_heads(panel.with_texts(most, general=False), m)[0] for m in merges]
    seen = fidelities(panel.with_texts(rest, general=False), [(m, 1.0) for m in with_heads])
    judged = [(f.kept, f.beyond_chance) for f in seen]
    pairs = [(a, b) for a in range(len(merges)) for b in range(len(merges))]
    better = next((a, b) for a, b in pairs if all(y > x for x, y in zip(judged[a], judged[b], strict=True)))
    surer = next((a, b) for a, b in pairs if judged[a][0] < judged[b][0] and judged[a][1] >= judged[b][1])
    claimed = Repair(5, {"merge": 0.1, "repaired": 0.2}, kept=True, first_loss=1.0, last_loss=0.5)

    for start, end in (better, better[::-1], surer):
        monkeypatch.setattr(finishing, "repaired", lambda *_, end=end, **__: (merges[end], claimed))
        done, record, _ = finishing.finished(
            Midway(merges[start], AutoRecord((), "base"), {}), panel, AutoSettings(repair=5)
        )
        held_out = record.repair.held_out
        assert [held_out[f"{which}, heads"] for which in ("merge", "repaired")] == pytest.approx(
            [judged[start][0], judged[end][0]], abs=1e-6
        )
        assert [held_out[f"{which}, heads: agreement"] for which in ("merge", "repaired")] == pytest.approx(
            [judged[start][1], judged[end][1]], abs=1e-6
        )
        assert record.repair.kept == record.repair.closer == ((start, end) == better)
        assert same(replace(done, heads={}), replace(merges[end if record.repair.kept else start], heads={}))
        assert f", agreement beyond chance {held_out['merge, heads: agreement']:.3f} -> " in repair_text(record.repair)
        settings = AutoSettings(repair=5, heads=False)
        plain = finishing.finished(Midway(merges[start], AutoRecord((), "base"), {}), panel, settings)
        assert plain[1].repair == claimed and same(plain[0], merges[end])
    near, far = merges[better[1]], merges[better[0]]
    none_held_out = replace(claimed, held_out={})
    assert finishing.judged_with_heads(panel, near, far, none_held_out) == none_held_out  # nothing to judge by


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_it_comes_closer_and_says_how_far(make_panel, architecture, kind):
    """Random adapters have nothing that carries over to other texts: every text is there four times."""
    panel = make_panel(architecture, kind, texts=6)
    panel = replace(
        panel, texts={t: tuple(x for x in rows for _ in range(4)) for t, rows in panel.texts.items()}, _own=None
    )
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    done, record = repair.repaired(panel, start, 40, rate=1e-2)
    assert record.kept and record.last_loss < record.first_loss
    rest = panel.with_texts({t: rows[3::4] for t, rows in panel.texts.items()}, general=False)
    before, after = fidelities(rest, [(start, 1.0), (done, 1.0)])
    assert before.kept == pytest.approx(record.held_out["merge"], abs=1e-6)
    assert after.kept == pytest.approx(record.held_out["repaired"], abs=1e-6) and after.kept > before.kept
    assert same(done, repair.repaired(panel, start, 40, rate=1e-2)[0])
