"""A model's head: its own tensors, found without a look through the backbone."""

from __future__ import annotations

import pytest
import torch

from plait.model.base import load_task_model
from plait.model.parts import backbone_of, head_modules, head_state, load_head
from tests.tiny import ARCHITECTURES, make_task


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_is_copied_and_put_back_without_the_backbone(tiny_base, architecture, monkeypatch):
    """Panels put heads in for every answer: what grows with the backbone would be most of their time."""
    model = load_task_model(tiny_base(architecture), make_task(), seed=0)
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    backbone, _ = backbone_of(model)
    monkeypatch.setattr(backbone, "state_dict", lambda *_, **__: pytest.fail("looked through the backbone"))
    head = head_state(model)
    assert head.keys() == {k for k in whole if k.partition(".")[0] in head_modules(model)} != set()
    load_head(model, {k: v + 1 for k, v in head.items()})
    assert all(torch.equal(v, whole[k] + 1) for k, v in head_state(model).items())
    monkeypatch.undo()
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items() if k not in head)
