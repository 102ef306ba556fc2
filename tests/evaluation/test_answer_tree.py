"""Answers as one tree of tokens: the same likelihoods as one by one, for every model that says it takes trees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from plait.evaluation import answer_tree
from plait.evaluation.answer_tree import TREE_MODELS, takes_trees
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.model.base import load_task_model, load_tokenizer
from tests.evaluation.test_fleet import grown
from tests.tiny import choice_scores, make_adapter, make_examples, make_task, save_tokenizer

ANSWERS = ("w0 w3", "w0 w3 w5", "w0 w4 w5", "w1", "w1 w4", "w9", "w9 w9 w9 w9")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_a_tree_holds_shared_beginnings_once_and_every_path():
    answers = [[5, 6, 2], [5, 7, 2], [5, 2], [8, 6, 2]]
    tree = answer_tree.answer_tree(answers, torch.device("cpu"))
    assert tree.tokens.tolist() == [5, 6, 7, 8, 6] and tree.depth.tolist() == [1, 2, 2, 1, 2]
    assert tree.sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    edges = [*zip(tree.edge_from.tolist(), tree.edge_token.tolist(), strict=True)]
    for answer, path in zip(answers, tree.paths.tolist(), strict=True):
        assert [edges[e][1] for e in path if e < len(edges)] == answer
    assert len(edges) == 9  # a token that several answers share is predicted once


def tiny(kind: str, folder):
    import transformers as hf

    words = save_tokenizer(folder, "llama")
    torch.manual_seed(0)
    ids = {"initializer_range": 0.1, "vocab_size": words, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "gpt2":
        config = hf.GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64)
    else:
        more = {"head_dim": 8} if kind in ("gemma", "qwen3") else {}
        config = hf.AutoConfig.for_model(kind, **ids, **SIZES, num_key_value_heads=2, **more)
        if kind in ("mistral", "phi3"):
            config.sliding_window = None
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", TREE_MODELS)
def test_every_model_of_the_list_scores_as_one_by_one(kind, tmp_path, tiny_base, monkeypatch):
    base = dataclasses.replace(tiny_base("llama"), name=tiny(kind, tmp_path))
    task = dataclasses.replace(make_task(kind="causal"), labels=ANSWERS)
    model, tokenizer = load_task_model(base, task, seed=0), load_tokenizer(tiny_base("llama"))
    assert takes_trees(model)
    examples = make_examples(make_task(kind="causal"), 7)
    found = choice_scores(model, tokenizer, task, examples, 3, 40)
    monkeypatch.setattr(answer_tree, "TREE_MODELS", ())
    assert not takes_trees(model)
    expected = choice_scores(model, tokenizer, task, examples, 3, 40)
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_a_sliding_window_or_another_attention_takes_no_trees(tiny_base):
    model = load_task_model(tiny_base("llama"), make_task(kind="causal"), seed=0)
    assert takes_trees(model)
    for name, value in {
        "sliding_window": 16,
        "_attn_implementation": "flash_attention_2",
        "layer_types": ["linear_attention"],
        "model_type": "jamba",
    }.items():
        other = type(
            "Other", (), {"config": type("Config", (), {**vars(model.config), "model_type": "llama"} | {name: value})}
        )
        assert not takes_trees(other), name


@pytest.mark.parametrize(("kind", "architecture"), [("causal", "llama"), ("causal", "gpt2"), ("seq2seq", "t5")])
def test_many_candidates_choose_as_each_alone(tiny_base, kind, architecture):
    base, task = tiny_base(architecture), dataclasses.replace(make_task(kind=kind), labels=ANSWERS)
    examples = dataclasses.replace(make_examples(make_task(kind=kind), 9), labels=("w0 w3",) * 9)
    evaluator = Evaluator(base, {"topic": task}, {"topic": examples}, 4, 30)
    start = make_adapter(base, task, architecture)
    full = dataclasses.replace(
        grown(start, 3, 5), modules={start.full_name(n): f for n, f in grown(start, 3, 5).modules.items()}
    )
    candidates = [Candidate({}, grown(start, 4, 1)), Candidate({}), Candidate({}, full, 0.4)]
    for rows, limit in ((None, None), (np.array([3, 8, 0]), 2)):
        many = predict_many(evaluator, "topic", candidates, rows, limit=limit)
        for c, found in zip(candidates, many, strict=True):
            expected = evaluator.predict("topic", {}, c.adapter, c.scale, rows)
            assert found.shape == (9 if rows is None else 3, len(ANSWERS))
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(many[0] - many[1]).max() > 0.01
