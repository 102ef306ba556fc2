"""Texts of a step in passes of like length: fewer pads, the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch

from plait.learning import passes, teachers, text_teachers
from plait.learning.distil import Learning
from plait.learning.losses import loss_of
from plait.learning.passes import FLOOR, passes_of

ROWS = [[0, 3, 1, 5], [2, 2, 4, 0]]


def test_every_text_is_in_one_pass_and_few_pads_are_computed():
    lengths = [3, 60, 11, 12, 47, 9, 14, 26, 30, 8] * 4
    cut = passes_of(lengths, "cpu")
    assert sorted(p for some in cut for p in some) == list(range(len(lengths)))
    assert all(some == sorted(some) for some in cut)
    tokens = sum(max(lengths[p] for p in some) * len(some) for some in cut)
    assert tokens < 0.6 * max(lengths) * len(lengths)
    assert passes_of(lengths, "cuda") == [list(range(len(lengths)))]  # there a pass costs more than its pads
    assert passes_of([7], "cpu") == [[0]]


@pytest.mark.parametrize("layers", [0.0, 0.1])
@pytest.mark.parametrize("kind", [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")], ids="-".join)
def test_passes_change_neither_the_loss_nor_its_gradients(make_panel, monkeypatch, kind, layers):
    """A step is a sum over texts, and a layer's distance one over positions, however they are cut."""
    panel = make_panel(*kind, texts=6)
    ragged = {
        t: tuple((row[0] + " w1 w2 w3" * (i % 3), *row[1:]) for i, row in enumerate(x)) for t, x in panel.texts.items()
    }
    panel = panel.with_texts(ragged)
    loss = loss_of(panel, layers)
    seen = {}
    module = text_teachers if panel.is_text else teachers
    for floor in (1, 1 << 40):
        monkeypatch.setitem(FLOOR, "cpu", floor)
        counted: list[int] = []

        def counting(lengths, device, counted=counted):
            cut = passes.passes_of(lengths, device)
            counted.append(len(cut))
            return cut

        monkeypatch.setattr(module, "passes_of", counting)
        learning = Learning.of(panel, panel.parts[0].adapter, "factors", {}, 1e-3, 5)
        value = loss(ROWS, learning.applying)
        parameters = [p for s in learning.students.values() for p in s.parameters]
        seen[floor] = value.detach(), torch.autograd.grad(value, parameters)
        assert (counted[0] > 1) == (floor == 1)
    (one, many), (two, whole) = seen[1], seen[1 << 40]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    size = max(float(g.abs().max()) for g in whole)
    for a, b in zip(many, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)
