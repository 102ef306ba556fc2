"""Text tasks: answers chosen by likelihood, texts written, and the whole line from a recipe."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from pyarrow import parquet

from plait.errors import UsageError
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.text import answer_ids, perplexity, prompts_of, rouge_l, write_texts
from plait.model.base import load_task_model, load_tokenizer
from plait.tasks import collate, encode
from plait.training import TrainingSettings, train_adapter
from tests.tiny import TARGETS, WORDS, choice_scores, make_adapter, make_examples, make_task

KINDS = [("causal", "llama"), ("causal", "gpt2"), ("seq2seq", "t5")]


def answered(kind):
    return dataclasses.replace(make_task(kind=kind), labels=("w0 w3", "w1 w4", "w9"))


def nll(model, tokenizer, task, examples):
    """Summed loss of each row's answer, one row at a time, from the definition."""
    found = []
    for row in encode(tokenizer, task, examples, 40):
        batch = collate(tokenizer, [row])
        labels = batch.pop("labels")
        extra = {"labels": labels} if task.kind == "seq2seq" else {}
        with torch.no_grad():
            logits = model(**batch, **extra).logits.log_softmax(-1)
        logits, labels = (logits, labels) if task.kind == "seq2seq" else (logits[:, :-1], labels[:, 1:])
        found.append(sum(-float(logits[0, j, t]) for j, t in enumerate(labels[0]) if t != -100))
    return found


@pytest.mark.parametrize(("kind", "architecture"), KINDS)
def test_choice_scores_are_the_likelihoods_of_the_answers(tiny_base, kind, architecture):
    base, task = tiny_base(architecture), answered(kind)
    model, tokenizer, examples = (
        load_task_model(base, task, seed=0),
        load_tokenizer(base),
        make_examples(make_task(kind=kind), 7),
    )
    found = choice_scores(model, tokenizer, task, examples, 3, 40)
    for c, answer in enumerate(task.labels):
        expected = nll(model, tokenizer, task, dataclasses.replace(examples, labels=(answer,) * len(examples)))
        np.testing.assert_allclose(-found[:, c], expected, rtol=2e-5, atol=2e-5)
    assert math.isclose(
        perplexity(model, tokenizer, task, examples, batch_size=3, max_length=40),
        math.exp(sum(nll(model, tokenizer, task, examples)) / (3 * len(examples))),
        rel_tol=1e-4,
    )


@pytest.mark.parametrize(("kind", "architecture"), KINDS)
def test_a_trained_adapter_chooses_and_writes_the_right_answer(tiny_base, tmp_path, kind, architecture):
    base = tiny_base(architecture)
    task = dataclasses.replace(make_task(kind=kind), labels=("w0 w3", "w1 w4"))
    examples, settings = make_examples(task, 48), TrainingSettings(steps=150, lr=3e-2, batch_size=16, max_length=40)
    adapter = train_adapter(
        make_adapter(base, task, architecture, rank=8),
        task,
        examples,
        base,
        settings,
        seed=0,
        out=tmp_path / "a",
        identity={"schema": 1},
    )
    evaluator = Evaluator(base, {"topic": task}, {"topic": examples}, 5, 40)
    scores = evaluator.predict("topic", {}, adapter)
    right = answer_ids(task, examples)
    rows = np.arange(len(examples))
    better = {
        s.metric: s.value
        for s in evaluator.score_rows(scores, "topic", rows, arm="", adapter="", method="", scale=1.0, seed=0, split="")
    }
    assert better["exact_match"] == 100.0 * (scores.argmax(1) == right).mean() > 80
    part = evaluator.predict("topic", {}, adapter, 1.0, np.array([4, 0]))
    np.testing.assert_allclose(part, scores[[4, 0]], atol=1e-4)
    from plait.model.applied import applied

    model = evaluator.task_model("topic")
    with applied(model, adapter):
        prompts = prompts_of(task, encode(evaluator.tokenizer, task, examples, 40))
        written = write_texts(model, evaluator.tokenizer, prompts, new_tokens=4, batch_size=7)
    agree = np.mean([w == task.labels[i] for w, i in zip(written, scores.argmax(1), strict=True)])
    assert agree > 0.8


def test_a_model_that_is_lost_has_a_perplexity_still(tiny_base):
    base, task = tiny_base("gpt2"), make_task(kind="causal")
    model, tokenizer = load_task_model(base, task, seed=0), load_tokenizer(base)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e5)
    try:
        found = perplexity(model, tokenizer, task, make_examples(task, 3), batch_size=3, max_length=40)
    finally:
        with torch.no_grad():
            model.transformer.ln_f.weight.div_(1e5)
    assert 1e300 < found < math.inf


def test_rouge_l():
    assert rouge_l("the cat sat", "The cat, sat!") == 100.0
    assert math.isclose(rouge_l("a b c d", "a c e"), 200 * 2 / 7)
    assert rouge_l("", "a") == 0.0 == rouge_l("x", "y")
    assert rouge_l("किताब", "कुताब") == 0.0 and rouge_l("น้ำ", "นา") == 0.0  # vowels belong to their word
    assert rouge_l("İstanbul", "i̇stanbul.") == 100.0 and rouge_l("naïve-bayes", "Naïve Bayes") == 100.0


def test_open_answers_and_unknown_ones_are_named():
    task = make_task(kind="causal")
    with pytest.raises(UsageError, match="none are listed"):
        answer_ids(task, make_examples(task))
    with pytest.raises(UsageError, match="is not one of"):
        answer_ids(dataclasses.replace(task, labels=("x",)), make_examples(task))


@pytest.mark.parametrize(("kind", "architecture"), [("causal", "llama"), ("seq2seq", "t5")])
def test_text_tasks_pass_through_the_whole_line(tiny_base, tmp_path, kind, architecture):
    from plait import run
    from plait.recipes.recipe import Recipe

    rng = np.random.default_rng(0)
    tasks = []
    for i, name in enumerate(("one", "two")):
        for split in ("train", "validation"):
            lines = []
            for _ in range(40):
                t = int(rng.integers(2))
                words = " ".join(WORDS[w] for w in [t + 2 * i, *rng.integers(10, 60, 5)])
                lines.append(json.dumps({"text": words, "answer": f"{WORDS[t + 4]} {WORDS[t + 6]}"}))
            (tmp_path / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        tasks.append(
            {"name": name, "kind": kind, "text": ["text"], "label": "answer", "template": "{text} w50",
             "train": f"{name}-train.jsonl", "validation": f"{name}-validation.jsonl"}
        )  # fmt: skip
    # Two answers of two words leave a decoder's first layer no four directions to tell tasks apart by: encoder only.
    targets = r".*encoder\..*\.(q|v)" if architecture == "t5" else list(TARGETS[architecture])
    recipe = Recipe.model_validate(
        {
            "name": "text", "base": {"model": tiny_base(architecture).name, "device": "cpu"},
            "tasks": tasks, "data": {"root": str(tmp_path), "max_length": 24}, "arms": ["kaiming", "osrm", "contrastive"],
            "lora": {"rank": 4, "target_modules": targets}, "statistics": {"samples": 20},
            "training": {"steps": 8, "batch_size": 8, "lr": 0.02}, "merges": ["task_arithmetic"],
        }
    )  # fmt: skip
    run(recipe, tmp_path / "out", quiet=True)
    rows = parquet.read_table(tmp_path / "out/report/scores.parquet").to_pylist()
    merged = {(r["arm"], r["task"]) for r in rows if r["adapter"] == "merged" and r["split"] in ("A", "B")}
    assert merged == {(a, t) for a in ("kaiming", "osrm", "contrastive") for t in ("one", "two")}
    assert {r["metric"] for r in rows} == {"exact_match", "score"}
    assert list((tmp_path / "out").rglob("report.html"))
