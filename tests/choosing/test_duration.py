"""How long a choice will take is told before: its work is counted, and timed on a few texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest

from plait.choosing import duration
from plait.choosing.auto import AutoSettings, merge_auto
from plait.choosing.counting import (
    advising,
    choosing,
    fitting,
    general,
    judging,
    making,
    measuring,
    repairing,
    seen_and_judged,
)
from plait.choosing.duration import Pace, Work, pace_of, tokens_of
from plait.choosing.tournament import ROUNDS
from plait.fidelity.panel import WRITTEN
from plait.fidelity.score import fidelities
from plait.fidelity.texts import HELD_OUT
from plait.fidelity.tokens import encoded
from plait.learning.fitting import SCALES as FITTED_AT
from plait.learning.fitting import TRIED
from plait.learning.head_learning import STEPS
from plait.model.base import backbone_of
from tests.panels import texts_of

PLAIN = AutoSettings(methods=("task_arithmetic", "tsv", "regmean"), scales=(0.2, 0.4, 0.6, 0.8), refine=0, fit=False)


def test_every_stage_is_counted_and_more_of_it_takes_longer(make_panel):
    panel = make_panel(texts=16)
    every = tokens_of(panel)
    work = choosing(panel, PLAIN)
    assert (work.merges, work.moments) == (
        2 + 2 + 4,
        2 * every,
    )  # with pico and without, regmean by two kinds of moments
    assert work.learnt == work.fitted == work.repaired == 0 < work.reads
    learnt = choosing(panel, replace(PLAIN, refine=10))
    assert learnt.learnt == 10 and learnt.reads - work.reads == pytest.approx(2 * every / HELD_OUT)
    fitted = choosing(panel, replace(PLAIN, fit=True))
    assert fitted.fitted == pytest.approx(2.5 * every)  # two on three quarters, one on all
    assert fitted.reads == pytest.approx(work.reads + fitting(panel).reads)
    looks = len(TRIED) * len(FITTED_AT) + 1  # each fit at each scale, and what there was before, on the texts held out
    assert fitting(panel).reads == pytest.approx(looks * every / HELD_OUT)
    most, looks = (
        every * (1 - 1 / HELD_OUT),
        2,
    )  # four readings of most of the texts; the rest before and after seven steps
    assert repairing(panel, 7).reads == pytest.approx(4 * most + looks * every / HELD_OUT)
    assert repairing(panel, 7).repaired == 7 and repairing(panel, 0) == Work()
    beside = panel.with_texts(panel.texts)
    beside.general = panel.texts["one"][:5]
    for stage in (measuring, lambda p: judging(p, 3), lambda p: fitting(p, 0.5)):
        assert stage(beside).reads > stage(panel).reads
    assert fitting(beside) == fitting(panel)  # no limit: nobody asks for general text


def test_an_advice_counts_its_own_fits_and_repairs(make_panel):
    panel = make_panel(texts=16)
    seen, judged = seen_and_judged(panel)
    assert tokens_of(seen) + tokens_of(judged) == tokens_of(panel)
    work = advising(seen, judged, [p.adapter for p in panel.parts], AutoSettings(refine=5), 6)
    assert work.fitted == pytest.approx(2 * 2.5 * tokens_of(seen))  # at the sum of the ranks, and at one adapter's
    assert (work.learnt, work.repaired) == (5, 2 * 6)  # at both ranks


def test_heads_that_are_learnt_are_counted(make_panel):
    """Twice their steps, at most, and what is read around them; of a text model, which has no heads, nothing."""
    panel = make_panel(texts=16)
    every = tokens_of(panel)

    def counted(panel, learn_heads):
        return making(panel, panel, replace(PLAIN, refine=3, learn_heads=learn_heads))

    alone, more = counted(panel, False), counted(panel, True)
    assert more.learnt - alone.learnt == 2 * STEPS
    assert more.reads - alone.reads == pytest.approx(every * (3 / 4 + 3 / 4 + 1))
    text = make_panel("llama", "causal", texts=16)
    assert counted(text, True) == counted(text, False)
    few = make_panel(texts=4)
    assert counted(few, True) == counted(few, False)  # nothing could be held out, and nothing is learnt


def test_general_texts_beside_prompts_are_counted_as_they_are_read(make_panel):
    """By the base and every merge, whoever's prompts the others are; nobody writes after them for that."""
    panel = make_panel("llama", "causal", texts=6, general=texts_of(5, 9), new_tokens=3)
    panel.positions = WRITTEN
    tokens = sum(len(row["input_ids"]) for row in encoded(panel, "causal", panel.general))
    assert general(panel, 3).reads == 4 * tokens and not panel.answers


def test_texts_of_a_second_round_are_not_read_again(make_panel):
    """What is counted of a second round of a classifier is what its model is really given."""
    panel = make_panel(texts=ROUNDS[0][0] + 8)
    read: list[int] = []
    handle = backbone_of(panel.model(panel.parts[0]))[0].register_forward_pre_hook(
        lambda _, args, options: read.append((args[0] if args else options["input_ids"]).shape[0]), with_kwargs=True
    )
    part = panel.parts[0]
    merge = panel.parts[1].adapter  # of the panel itself: always kept
    few = panel.with_texts({t: rows[: ROUNDS[0][0]] for t, rows in panel.texts.items()})
    first = fidelities(few, [(part.adapter, 0.7)], keep=True)[0]
    before = sum(read)
    assert before == 2 * 3 * ROUNDS[0][0]
    whole = fidelities(panel, [(part.adapter, 0.7)], keep=True)[0]
    assert sum(read) - before == 2 * 3 * 8
    assert fidelities(panel, [(part.adapter, 0.7)], keep=True)[0] == whole and sum(read) - before == 2 * 3 * 8
    handle.remove()
    panel.known.forget_others(())
    again = fidelities(few, [(part.adapter, 0.7), (merge, 1.0)])[0]
    assert again.score == pytest.approx(first.score, abs=1e-6)


def test_a_pace_times_each_kind_of_work(make_panel, monkeypatch):
    panel = make_panel(texts=12)
    ticks = count(0.0)  # whatever is timed takes a second
    pace = pace_of(panel, [p.adapter for p in panel.parts], clock=lambda: next(ticks))
    few = tokens_of(panel.with_texts(duration._alike(panel.texts)))
    assert pace.seconds.reads == pytest.approx(1 / (8 * few))
    assert pace.seconds.learnt == pytest.approx(0.5) and pace.seconds.repaired > 0.5
    assert pace.seconds_of(Work(reads=16 * few, learnt=4)) == pytest.approx(4.0)
    assert Pace(Work(reads=1, moments=2)).seconds_of(Work(reads=3) + Work(moments=5) * 2) == 23
    assert all(s > 0 for s in (pace.seconds.moments, pace.seconds.merges, pace.seconds.fitted, pace.seconds.solved))


def test_it_is_told_before_the_first_round(make_panel):
    panel = make_panel(texts=4)
    said: list[str] = []
    settings = AutoSettings(methods=("task_arithmetic",), scales=(0.5,), refine=0, fit=False)
    asked = [p.adapter for p in panel.parts], panel.base, panel.texts
    merge_auto(*asked, settings=settings, on_progress=said.append)
    assert said[2].startswith("about ")  # loading and timing come first
    said.clear()
    merge_auto(*asked, settings=settings, announce=False, on_progress=said.append)
    assert not any(line.startswith("about ") for line in said)


def test_merges_are_timed_on_modules_that_all_adapters_have(make_panel):
    one, two = (p.adapter for p in make_panel(texts=4).parts[:2])
    first, *others = one.modules
    two = replace(two, modules={m: two.modules[m] for m in others})
    sampled, share = duration._sampled([one, two])
    assert [list(a.modules) for a in sampled] == [others[: duration._SAMPLED]] * 2
    assert share == min(duration._SAMPLED, len(others)) / len(one.modules)
    apart = replace(two, modules={others[0]: two.modules[others[0]]}), replace(one, modules={first: one.modules[first]})
    assert duration._sampled(apart) == ([*apart], 1.0)
