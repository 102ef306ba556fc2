"""An adapter on a live model: the dense sum, untouched weights, and errors that name the module."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import InputError, RunError
from plait.evaluation.evaluate import Evaluator
from plait.model.applied import applied, resolve
from plait.model.base import backbone_of, head_state, load_task_model
from plait.tasks import Examples, Source, Task
from tests.tiny import ARCHITECTURES, TARGETS, WORDS

TASK = Task("topic", "classification", Source("none"), ("text",), labels=("a", "b", "c"))
VALUE = Task("grade", "regression", Source("none"), ("text",), metrics=("pearson",))
BATCH = {
    "input_ids": torch.tensor([[0, 7, 9, 2], [0, 8, 2, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def random_adapter(model, architecture: str, size: float = 0.2) -> Adapter:
    backbone, prefix = backbone_of(model)
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, module in backbone.named_modules():
        if name.endswith(TARGETS[architecture]) and hasattr(module, "weight"):
            n_out, n_in = module.weight.shape[::-1] if architecture == "gpt2" else module.weight.shape
            A, B = torch.randn(2, n_in, generator=generator), torch.randn(n_out, 2, generator=generator)
            modules[name] = LoraFactors(A * size, B * size, 1.5)
    return Adapter("topic", "tiny", modules, "SEQ_CLS", prefix)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_the_same_as_dense_weights_and_nothing_is_left_behind(tiny_base, architecture):
    model = load_task_model(tiny_base(architecture), TASK, seed=0)
    adapter = random_adapter(model, architecture)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bare = model(**BATCH).logits
    for scale in (1.0, 0.3, -1.0):
        with applied(model, adapter, scale):
            found = model(**BATCH).logits
        dense = load_task_model(tiny_base(architecture), TASK, seed=0)
        for name, factors in adapter.modules.items():
            delta = scale * factors.delta()
            resolve(dense, name).weight += delta.T if architecture == "gpt2" else delta
        torch.testing.assert_close(found, dense(**BATCH).logits, rtol=1e-3, atol=1e-4)
        assert not torch.equal(found, bare)
    assert torch.equal(model(**BATCH).logits, bare)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for nothing in (applied(model, None), applied(model, adapter, 0.0)):
        with nothing:
            assert torch.equal(model(**BATCH).logits, bare)


@torch.inference_mode()
def test_hooks_leave_after_an_error_and_two_adapters_add_up(tiny_base):
    model = load_task_model(tiny_base("bert"), TASK, seed=0)
    bare, adapter = model(**BATCH).logits, random_adapter(model, "bert")
    with pytest.raises(ZeroDivisionError), applied(model, adapter):
        raise ZeroDivisionError
    assert torch.equal(model(**BATCH).logits, bare)
    with applied(model, adapter, 2.0):
        twice = model(**BATCH).logits
    with applied(model, adapter), applied(model, adapter):
        torch.testing.assert_close(model(**BATCH).logits, twice, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_adapters_of_another_base(tiny_base):
    model = load_task_model(tiny_base("bert"), TASK, seed=0)
    adapter = random_adapter(model, "bert")
    name = next(iter(adapter.modules))
    bare = model(**BATCH).logits
    wrong = {**adapter.modules, "layer.99.query": adapter.modules[name]}
    with pytest.raises(InputError, match=r"layer\.99\.query"), applied(model, replace(adapter, modules=wrong)):
        pass
    small = {name: LoraFactors(torch.ones(2, 5), torch.ones(7, 2))}
    with (
        pytest.raises(InputError, match=r"update is \(7, 5\)") as raised,
        applied(model, replace(adapter, modules=small)),
    ):
        model(**BATCH)
    assert raised.value.where == name and torch.equal(model(**BATCH).logits, bare)


def evaluator(base, rows: int = 10) -> Evaluator:
    texts = tuple((" ".join(WORDS[i : i + 1 + i % 5]),) for i in range(rows))
    examples = {
        "topic": Examples(texts, np.arange(rows) % 3, np.arange(rows)),
        "grade": Examples(texts, np.linspace(0, 1, rows, dtype=np.float32), np.arange(rows)),
    }
    return Evaluator(base, {"topic": TASK, "grade": VALUE}, examples, batch_size=4, max_length=16)


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_batch_size_and_choice_of_rows_change_nothing(tiny_base, architecture):
    base = tiny_base(architecture)
    one, other = evaluator(base), evaluator(base)
    other.batch_size = 3
    heads = {t.name: head_state(load_task_model(base, t, seed=1)) for t in (TASK, VALUE)}
    for task, head in heads.items():
        found = one.predict(task, head)
        assert found.shape == (10, 3 if task == "topic" else 1)
        np.testing.assert_allclose(other.predict(task, head), found, rtol=1e-4, atol=1e-5)
        rows = np.array([7, 2, 3])
        np.testing.assert_allclose(one.predict(task, head, rows=rows), found[rows], rtol=1e-4, atol=1e-5)
    predicted, labels = (
        one.predict("topic", heads["topic"]),
        {"arm": "", "adapter": "alone", "method": "", "scale": 1.0},
    )
    scored = one.score_rows(predicted, "topic", np.arange(10), **labels, seed=0, split="reported")
    assert {s.metric for s in scored} == {"accuracy", "score"} and all(s.n == 10 for s in scored)


def test_predictions_that_are_no_numbers_and_heads_of_another_task(tiny_base):
    base = tiny_base("bert")
    one, head = evaluator(base), head_state(load_task_model(base, TASK, seed=1))
    with pytest.raises(RunError, match="NaN or infinity at scale 1") as raised:
        one.predict("topic", {k: torch.full_like(v, float("nan")) for k, v in head.items()})
    assert raised.value.where == "task topic"
    with pytest.raises(InputError, match="the model expects"):
        one.predict("grade", head)
    with pytest.raises(InputError, match="absent"):
        one.predict("topic", {})


def test_a_module_is_found_from_the_backbone_or_from_the_whole_model(tiny_base):
    model = load_task_model(tiny_base("bert"), TASK, seed=0)
    query = model.bert.encoder.layer[1].attention.self.query
    for name, prefix in (
        ("encoder.layer.1.attention.self.query", "bert"),
        ("bert.encoder.layer.1.attention.self.query", ""),
    ):
        assert resolve(model, name, prefix) is query
    assert resolve(model, "classifier") is model.classifier
    for nowhere in ("encoder.layer.1.attention.self.query.weight", "encoder.layer.9", "layer"):
        with pytest.raises(InputError, match="no such module"):
            resolve(model, nowhere, "bert")
