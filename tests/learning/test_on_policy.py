"""On policy: the merge writes, the right adapter judges."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from plait.choosing.auto import AutoSettings, merge_auto
from plait.errors import UsageError
from plait.fidelity.panel import WRITTEN
from plait.fidelity.ready_panel import ready_panel
from plait.learning.distil import AHEAD, RATES, Learning, distil
from plait.learning.on_policy import OnPolicyLoss
from plait.learning.repair import repaired
from plait.merging import merge
from plait.model.applied import applied
from tests.panels import adapters_of, same


@pytest.fixture
def asked(make_panel):
    def make(texts: int = 6, new_tokens: int = 5):
        return make_panel("llama", "causal", texts=texts, positions=WRITTEN, new_tokens=new_tokens)

    return make


def learning_of(panel, scale: float = 0.3) -> Learning:
    start = merge(adapters_of(panel), "task_arithmetic", scale=scale).adapter
    return Learning.of(panel, start, "factors", {}, 1e-3, 1)


def test_it_is_the_reverse_divergence_at_the_merges_own_tokens(asked):
    """Against the definition, one answer at a time."""
    panel = asked()
    learning, loss, rows = learning_of(panel), OnPolicyLoss(panel), [[0, 3], [2, 5]]
    loss.prepare([rows], learning.applying)
    model, expected = panel.model(panel.parts[0]), 0.0
    for i, (part, places) in enumerate(zip(panel.parts, rows, strict=True)):
        kls, rooms = [], []
        for n in places:
            row = loss.written[i, n]
            start = len(loss.prompts[i][n])
            assert row["input_ids"][:start] == loss.prompts[i][n] and 1 <= len(row["input_ids"]) - start <= 5
            ids = torch.tensor([row["input_ids"]])
            logs = []
            for worn in (learning.merge, part.adapter, None):
                with torch.no_grad(), applied(model, worn):
                    logs.append(model(ids).logits[0, start - 1 : -1].double().log_softmax(-1))
            merged, own, bare = logs
            kls.append((merged.exp() * (merged - own)).sum(-1))
            rooms.append((bare.exp() * (bare - own)).sum(-1))
        assert loss.rooms[i] == pytest.approx(max(float(torch.cat(rooms).mean()), 0.05), rel=1e-4)
        expected += float(torch.cat(kls).mean()) / loss.rooms[i] / 2
    assert float(loss(rows, learning.applying).detach()) == pytest.approx(expected, rel=1e-4)


def test_its_gradient_is_that_of_finite_differences(asked):
    panel = asked()
    learning, loss, rows = learning_of(panel), OnPolicyLoss(panel), [[0, 1], [2, 3]]
    loss.prepare([rows], learning.applying)
    name, student = next(iter(learning.students.items()))
    value = loss(rows, learning.applying)
    gradients = torch.autograd.grad(value, [student.A, student.B])
    g = torch.Generator().manual_seed(0)
    for parameter, gradient in zip((student.A, student.B), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=g)
        direction /= direction.norm()
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter += step * direction
                ends.append(float(loss(rows, learning.applying)))
                parameter -= step * direction
        slope = (ends[0] - ends[1]) / 2e-2
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.03, abs=2e-4), name


def test_what_was_written_is_a_few_steps_old_at_most(asked):
    panel = asked(texts=5)
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    loss = OnPolicyLoss(panel)
    prepared: list[int] = []
    original = loss.prepare

    def counted(coming, applying):
        prepared.append(len(coming))
        original(coming, applying)

    loss.prepare = counted
    distil(panel, start, learns="factors", steps=2 * AHEAD + 3, batch=2, loss=loss)
    assert prepared == [AHEAD, AHEAD, 3]


def test_one_adapter_that_judges_itself_stays(asked):
    panel = asked()
    part = panel.parts[0]
    alone = replace(panel, parts=[part], texts={part.name: panel.texts[part.name]})
    done = distil(alone, part.adapter, learns="factors", rate=RATES["factors"] / 10, steps=10, loss=OnPolicyLoss(alone))
    assert max(done.first_loss, done.last_loss) < 1e-3


def test_it_comes_closer(asked):
    panel = asked(texts=4)
    panel = replace(
        panel, texts={t: tuple(x for x in rows for _ in range(4)) for t, rows in panel.texts.items()}, _own=None
    )
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    done, record = repaired(panel, start, 24, on_policy=True, rate=1e-2)
    assert record.on_policy and record.last_loss < 0.8 * record.first_loss
    assert record.kept == (record.held_out["repaired"] > record.held_out["merge"])
    assert same(done, repaired(panel, start, 24, on_policy=True, rate=1e-2)[0])


def test_only_for_those_that_write(make_panel):
    with pytest.raises(UsageError, match="no repair"):
        AutoSettings(on_policy=True)
    for architecture, kind in (("bert", "classification"), ("t5", "seq2seq")):
        panel = make_panel(architecture, kind, texts=4)
        with pytest.raises(UsageError, match="not causal"):
            ready_panel(panel.base, adapters_of(panel), panel.texts, on_policy=True)
        with pytest.raises(UsageError, match="not causal"):
            OnPolicyLoss(panel)
    panel = make_panel("llama", "causal", texts=4)
    found, chat = ready_panel(panel.base, adapters_of(panel), panel.texts, on_policy=True, new_tokens=3)
    assert found.positions == WRITTEN and not chat.used
    with contextlib.suppress(StopIteration):
        assert next(iter(found.answers.values()))


def test_the_whole_choice_with_it(make_panel):
    """Told beforehand, followed in the adapters' own answers without any template, recorded."""
    panel = make_panel("llama", "causal", texts=12)
    said: list[str] = []
    settings = AutoSettings(
        methods=("task_arithmetic",), scales=(0.3,), refine=0, fit=False, repair=8, on_policy=True, new_tokens=3, max_length=24
    )  # fmt: skip
    found = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=settings, on_progress=said.append)
    record = found.record
    assert record.repair.on_policy and record.repair.most == 8 and record.chat is None
    assert [look.step for look in record.repair.looks] == [0, 8]
    assert all(t.fidelity.verbatim is not None for t in record.fidelity.tasks)
    assert any("writes after its prompts, up to 3 tokens" in line for line in said)
    assert any("if a repair takes all its steps" in line for line in said)
