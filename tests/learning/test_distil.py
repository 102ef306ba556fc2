"""Distilling: the loss is its definition, and steps come closer."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from plait.adapters.lora import LoraFactors
from plait.fidelity.score import fidelities
from plait.fidelity.tokens import encoded
from plait.learning.distil import distil
from plait.learning.losses import loss_of
from plait.merging import merge
from plait.model.applied import applied
from plait.tasks import collate
from tests.panels import adapters_of


@pytest.mark.parametrize(("which", "head"), [("all", False), ("end", False), ("all", True), ("end", True)])
def test_the_distillation_loss_of_text_is_each_adapters_divergence_on_its_own_texts(make_panel, which, head):
    """Against the definition, one text at a time; also where an adapter changes the output layer."""
    panel = make_panel("llama", "causal", texts=6)
    panel.positions = which
    one, two = panel.parts
    model = panel.model(one)
    if head:
        g = torch.Generator().manual_seed(5)
        extra = LoraFactors(
            torch.randn(2, model.config.hidden_size, generator=g), torch.randn(model.config.vocab_size, 2, generator=g)
        )
        two = replace(two, adapter=replace(two.adapter, modules={**two.adapter.modules, "lm_head": extra}))
        panel = replace(panel, parts=[one, two])
        model = panel.model(one)
    places, expected = [[3, 0, 4], [1, 5, 2]], 0.0
    for part, chosen in zip((one, two), places, strict=True):
        kls, rooms = [], []
        for i, row in enumerate(encoded(panel, "causal", panel.texts[part.name])):
            batch = collate(panel.tokenizer, [row])
            with torch.no_grad():
                bare = model(**batch).logits[0].log_softmax(-1)
                with applied(model, part.adapter):
                    own = model(**batch).logits[0].log_softmax(-1)
            kl = (own.exp() * (own - bare)).sum(-1)[-1 if which == "end" else 0 :]
            rooms.append(kl)
            kls += [kl] if i in chosen else []
        room = max(float(torch.cat(rooms).mean()), 0.05)
        expected += float(torch.cat(kls).mean()) / room / 2
    loss = loss_of(panel)
    assert float(loss(places, contextlib.nullcontext).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("mpnet", "classification"), ("gpt2", "causal"), ("t5", "seq2seq"), ("t5", "classification")],
)
def test_a_repair_comes_closer(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=8)
    merged = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    done = distil(panel, merged, learns="factors", steps=15, rate=1e-2)
    before, after = fidelities(panel, [(merged, 1.0), (done.adapter, 1.0)])
    assert sum(t.kl / t.kl_base for t in after.tasks) < 0.9 * sum(t.kl / t.kl_base for t in before.tasks)
    assert {m: f.shape for m, f in done.adapter.modules.items()} == {m: f.shape for m, f in merged.modules.items()}
