"""Many candidates that write together write what each writes alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.errors import RunError
from plait.evaluation import writing
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.evaluation.text import prompts_of, write_texts
from plait.evaluation.writing import Writers, endings, write_many
from plait.model.applied import applied
from plait.model.stacked import stacked_factors
from plait.tasks import encode
from tests.tiny import make_adapter, make_examples, make_task


def grown(adapter: Adapter, rank: int, seed: int, size: float = 0.4) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    modules = {
        n: LoraFactors(
            torch.randn(rank, f.shape[1], generator=g) * size, torch.randn(f.shape[0], rank, generator=g) * size, 0.5
        )
        for n, f in adapter.modules.items()
    }
    return dataclasses.replace(adapter, name=f"m{seed}", modules=modules)


def setup(base, architecture="llama", rows=13, **options):
    task = dataclasses.replace(make_task(kind="causal"), metrics=("exact_match", "rouge_l"), **options)
    examples = make_examples(task, rows)
    evaluator = Evaluator(base, {"topic": task}, {"topic": examples}, batch_size=5, max_length=40)
    start = make_adapter(base, task, architecture)
    worn = [
        Candidate({}),
        Candidate({}, grown(start, 4, 1)),
        Candidate({}, grown(start, 7, 2), 0.6),
        Candidate({}, grown(start, 4, 1), -1.0),
    ]
    return evaluator, task, examples, worn


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("room", [40_000, 150])
def test_everybody_writes_as_alone(tiny_base, monkeypatch, architecture, room):
    evaluator, task, examples, worn = setup(tiny_base(architecture), architecture)
    monkeypatch.setitem(writing.TOKENS_HELD, "cpu", room)
    monkeypatch.setitem(writing.TOKENS_READ, "cpu", 100)
    monkeypatch.setattr(writing, "LOOK_EVERY", 2)  # so that rows leave the batch
    if architecture == "gpt2":  # its fused q, k, v is no linear layer that factors can be stacked on
        worn = worn[:1] * 3
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    prompts = prompts_of(task, encode(tokenizer, task, examples, 40))
    ends = endings(model, tokenizer, None, torch.device("cpu"))
    ends.always[10:40] = True  # ids that end a text, so that rows end at unlike times
    updates = stacked_factors(model, [(c.adapter, c.scale) for c in worn])
    many = write_many(Writers(model, tokenizer, ends, 12, updates, len(worn)), prompts)
    model.generation_config.eos_token_id = [2, *range(10, 40)]
    lengths = set()
    for candidate, texts in zip(worn, many, strict=True):
        with applied(model, candidate.adapter, candidate.scale):
            alone = write_texts(model, tokenizer, prompts, new_tokens=12)
        assert texts == alone
        lengths |= {len(t.split()) for t in texts}
    assert len(lengths) > 2


def test_measured_together_is_measured_alone(tiny_base):
    evaluator, task, _, worn = setup(tiny_base("llama"), compare="case", stop="w7")
    learned = dataclasses.replace(task, metrics=("rouge_l",))
    rows = np.array([3, 11, 0, 7])
    for metrics in (task.metrics, learned.metrics):
        evaluator.tasks["topic"] = dataclasses.replace(task, metrics=metrics)
        for chosen in (None, rows):
            many = predict_many(evaluator, "topic", worn, chosen, limit=3)
            for c, found in zip(worn, many, strict=True):
                expected = evaluator.predict("topic", {}, c.adapter, c.scale, chosen)
                np.testing.assert_allclose(found[:, :2], expected[:, :2])
                assert found.shape == expected.shape


def test_with_likelihood_everything_is_measured(tiny_base):
    evaluator, task, _, worn = setup(tiny_base("llama"))
    evaluator.tasks["topic"] = dataclasses.replace(task, metrics=("exact_match", "likelihood"))
    for c, found in zip(worn, predict_many(evaluator, "topic", worn), strict=True):
        np.testing.assert_allclose(found, evaluator.predict("topic", {}, c.adapter, c.scale), rtol=1e-5)
        assert (found[:, 3] > 0).all()


def test_a_stop_string_ends_an_answer_that_has_begun(tiny_base):
    evaluator, *_ = setup(tiny_base("llama"))
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    ends = endings(model, tokenizer, "w1", torch.device("cpu"))
    held = {tokenizer.convert_ids_to_tokens(int(i)) for i in ends.after_text.nonzero()[:, 0]}
    assert held == {"w1", *(f"w1{i}" for i in range(10))}  # w1, w10, ... hold it
    assert ends.always[tokenizer.convert_tokens_to_ids("w12")] and ends.always[tokenizer.eos_token_id]
    assert not ends.always[tokenizer.convert_tokens_to_ids("w2")]


def test_what_is_not_a_number_is_told(tiny_base):
    evaluator, *_, worn = setup(tiny_base("llama"))
    adapter = worn[1].adapter
    huge = {n: LoraFactors(f.A * 1e30, f.B * 1e30, f.scaling) for n, f in adapter.modules.items()}
    with pytest.raises(RunError, match="NaN or infinity"):
        predict_many(evaluator, "topic", [worn[0], Candidate({}, dataclasses.replace(adapter, modules=huge))])
