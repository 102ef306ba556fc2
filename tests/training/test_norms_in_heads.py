"""Heads that hold more than linear layers, as ModernBERT's norm: a fleet begins with the base's, whoever was trained or scored before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plait.disk.store import identity
from plait.model.base import BaseModel, draw_head, head_state, load_head, load_task_model
from plait.model.views import TaskModels
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.tiny import TARGETS, make_adapter, make_examples, make_task, save_tokenizer

NORM = "head.norm.weight"


@pytest.fixture
def modern(tmp_path, monkeypatch) -> BaseModel:
    import transformers as hf

    monkeypatch.setitem(TARGETS, "modernbert", ("Wqkv",))
    (folder := tmp_path / "modern").mkdir()
    words = save_tokenizer(folder, "bert")
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(vocab_size=words, max_position_embeddings=64, reference_compile=False, **ids, **sizes)
    )
    with torch.no_grad():
        model.head.norm.weight.fill_(1.5)
    model.save_pretrained(folder)
    return BaseModel(str(folder), device="cpu")


def test_a_view_begins_with_the_norms_of_the_base_and_has_them_again_whenever_its_head_is_drawn(modern):
    models, task = TaskModels(modern), make_task()
    view = models.of(task)
    assert head_state(view)[NORM].eq(1.5).all()
    draw_head(view, 3)
    fresh, alone = head_state(view), head_state(load_task_model(modern, task, seed=3))
    assert fresh.keys() == alone.keys() and all(torch.equal(fresh[k], v) for k, v in alone.items())
    load_head(view, {k: v + 7 for k, v in fresh.items()})
    draw_head(view, 3)
    assert all(torch.equal(v, fresh[k]) for k, v in head_state(view).items())


def test_members_of_a_fleet_begin_and_end_as_alone_also_after_one_that_brought_a_head(modern, tmp_path):
    first, second = make_task("first"), make_task("second")
    adapters = [make_adapter(modern, task, "modernbert") for task in (first, second)]
    trained = {k: v + 0.5 for k, v in head_state(load_task_model(modern, first, seed=0)).items()}
    adapters[0] = replace(adapters[0], heads={"first": trained})
    settings = TrainingSettings(steps=2, batch_size=8, lr=1e-3)
    rows = make_examples(first)
    given = list(zip(adapters, (first, second), strict=True))
    alone = [
        train_adapter(
            a, t, rows, modern, settings, seed=0, out=tmp_path / f"{t.name}-alone", identity=identity("a", {})
        )
        for a, t in given
    ]
    fleet = train_fleet(
        [Member(a, t, rows, settings, 0, tmp_path / t.name, identity("a", {})) for a, t in given], modern
    )
    for task, one, other in zip((first, second), alone, fleet, strict=True):
        heads = one.heads[task.name], other.heads[task.name]
        assert all(torch.allclose(heads[0][k], heads[1][k], atol=1e-4) for k in heads[0])
