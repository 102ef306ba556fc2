"""Chat data: which tokens are learnt, what is refused, and the whole line with answers chosen and answers written."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math

import numpy as np
import pytest
import torch
from pyarrow import parquet

from plait.errors import InputError, UsageError
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.text import perplexity, prompts_of, write_texts
from plait.model.base import load_task_model, load_tokenizer
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import run
from plait.tasks import Examples, Source, Task, encode, load_examples, load_task
from plait.tasks.chat import checked_messages, conversation, encode_chat, packed
from plait.tasks.metrics import rouge_l, score
from tests.tiny import TARGETS, WORDS, choice_scores, save_model

TEMPLATE = (
    "{% for m in messages %}<s> {{ {'system': 'w57', 'user': 'w58', 'assistant': 'w59'}[m['role']] }} {{ m['content'] }} "
    "</s> w56 {% endfor %}{% if add_generation_prompt %}<s> w59 {% endif %}"
)
TALK = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7 w8 w9"},
]


@pytest.fixture(scope="module")
def chat_base(tiny_base, tmp_path_factory):
    """A tiny Llama whose tokenizer has a chat template of plain words."""
    folder = save_model(tmp_path_factory.mktemp("chat") / "llama", "llama")
    base = dataclasses.replace(tiny_base("llama"), name=str(folder))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return base


def talk_task(**options) -> Task:
    return Task("talk", "causal", Source("none"), ("messages",), metrics=("exact_match",), chat="messages", **options)


def shown(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(chat_base, monkeypatch):
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 5)

    tokenizer = load_tokenizer(chat_base)
    tokenizer.chat_template = "{% set day = strftime_now(\"%d\") %}w{{ day }} w{{ strftime_now( '%d' ) }} " + TEMPLATE
    today = encode_chat(tokenizer, TALK)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert encode_chat(tokenizer, TALK) == today
    assert shown(tokenizer, today["input_ids"][:2]) == "w26 w26"


def test_only_the_assistant_is_learnt_and_its_end(chat_base):
    tokenizer = load_tokenizer(chat_base)
    row = encode_chat(tokenizer, TALK)
    learnt = [i for i, y in enumerate(row["labels"]) if y != -100]
    assert shown(tokenizer, [row["input_ids"][i] for i in learnt]) == "w4 w5 </s> w7 w8 w9 </s>"
    assert [row["labels"][i] for i in learnt] == [row["input_ids"][i] for i in learnt]
    assert row["input_ids"][-1] == tokenizer.eos_token_id  # the template's w56 after it is left off
    assert shown(tokenizer, prompts_of(talk_task(), [row])[0]).endswith("w6 </s> w56 <s> w59")
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert row["input_ids"] == list(whole)[:-1]
    examples = Examples((packed(TALK)[:1],), packed(TALK)[1:])
    short = encode(tokenizer, talk_task(), examples, 8)[0]
    assert short["input_ids"] == row["input_ids"][-8:] and short["labels"] == row["labels"][-8:]
    inside = learnt[2]  # within an earlier answer: nothing stands before its first token that is left
    begun = encode(tokenizer, talk_task(), examples, len(row["input_ids"]) - inside)[0]
    assert row["labels"][inside] != -100 and begun["labels"] == [-100, *row["labels"][inside + 1 :]]
    with pytest.raises(InputError, match="1 of 1 answer does not fit max_length 4: the longest has 4 tokens") as raised:
        encode(tokenizer, talk_task(), examples, 4)
    assert raised.value.where == "task talk" and "data.max_length: 32" in str(raised.value.hint)
    with pytest.raises(InputError, match="nothing stands before"):
        encode_chat(tokenizer, TALK[-1:])


def test_a_prompt_is_a_users_turn(chat_base):
    tokenizer, task = load_tokenizer(chat_base), dataclasses.replace(talk_task(), chat="prompt")
    row = encode(tokenizer, task, Examples((("w2 w3",),), ("w4",)), 32)[0]
    assert shown(tokenizer, row["input_ids"]) == "<s> w58 w2 w3 </s> w56 <s> w59 w4 </s>"
    assert [t for t in row["labels"] if t != -100] == row["input_ids"][-2:]
    assert conversation(*packed(TALK), "messages") == TALK


def test_templates_that_cannot_be_used(chat_base, tiny_base):
    tokenizer = load_tokenizer(tiny_base("llama"))
    with pytest.raises(InputError, match="no chat template"):
        encode_chat(tokenizer, TALK)
    tokenizer.chat_template = "{% if messages | length > 3 %}w40 {% endif %}" + TEMPLATE  # rewrites what came before
    with pytest.raises(InputError, match="another way"):
        encode_chat(tokenizer, TALK)
    assert encode_chat(tokenizer, TALK[:3])["labels"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("hello", "not a list"),
        ([], "not a list"),
        ([{"role": "robot", "content": "w1"}], "role 'robot'"),
        ([{"role": "user", "content": " "}], "no text"),
        (TALK[:2], "not the assistant's"),
    ],
)
def test_conversations_that_are_none(cell, message):
    with pytest.raises(InputError, match=message):
        checked_messages(cell, "row 0")


def test_tasks_that_contradict_themselves():
    with pytest.raises(UsageError, match="chat 'prompt' of a seq2seq task"):
        Task("t", "seq2seq", Source("x"), ("text",), chat="prompt")
    with pytest.raises(UsageError, match="2 columns of text, and conversations lie in one"):
        Task("t", "causal", Source("x"), ("a", "b"), chat="messages")
    with pytest.raises(UsageError, match="choose from"):
        Task("t", "causal", Source("x"), ("a",), labels=("x",), metrics=("rouge_l",))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_read_from_files(tmp_path, suffix):
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    if suffix == "jsonl":
        (tmp_path / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "talk.parquet")
    source = Source(f"talk.{suffix}", f"talk.{suffix}")
    task = load_task(dataclasses.replace(talk_task(), source=source), root=tmp_path)
    found = load_examples(task, "train", root=tmp_path)
    assert found.labels == ("w7 w8 w9", "w4 w5") and set(task.labels) == set(found.labels)
    assert [conversation(t[0], y, "messages") for t, y in zip(found.texts, found.labels, strict=True)] == [
        TALK,
        TALK[:3],
    ]
    rouge = dataclasses.replace(talk_task(), source=source, metrics=("rouge_l",))
    assert load_task(rouge, root=tmp_path).labels is None  # what is written is scored: answers stay open
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": TALK[:2]}) + "\n")
    with pytest.raises(InputError, match="row 0") as raised:
        load_examples(dataclasses.replace(task, source=Source("bad.jsonl", "bad.jsonl")), "train", root=tmp_path)
    assert "bad.jsonl" in str(raised.value.where)


def test_answers_after_conversations_are_chosen(chat_base):
    model, tokenizer = load_task_model(chat_base, talk_task(), seed=0), load_tokenizer(chat_base)
    task = dataclasses.replace(talk_task(), labels=("w7 w8 w9", "w7", "w3 w4"))
    before = packed(TALK)[0]
    found = choice_scores(model, tokenizer, task, Examples(((before,),), ("w7",)), 2, 64)[0]
    for answer, value in zip(task.labels, found, strict=True):
        row = encode(tokenizer, task, Examples(((before,),), (answer,)), 64)[0]
        n, learnt = len(row["input_ids"]), sum(t != -100 for t in row["labels"])
        last = learnt - 3  # the first turn's w4 w5 </s> is learnt in training, and no part of the choice
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row["input_ids"]])).logits.log_softmax(-1)[0]
        expected = sum(float(logs[i - 1, row["input_ids"][i]]) for i in range(n - last, n))
        assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-4)


# --- open answers -----------------------------------------------------------------------------------------------------


def test_open_answers_are_measured_as_defined(chat_base, monkeypatch):
    task = dataclasses.replace(talk_task(), metrics=("exact_match", "rouge_l", "likelihood"))
    rng = np.random.default_rng(0)
    texts = tuple((json.dumps([{"role": "user", "content": WORDS[int(w)]}]),) for w in rng.integers(0, 50, 6))
    model, tokenizer = load_task_model(chat_base, task, seed=0), load_tokenizer(chat_base)
    prompts = prompts_of(task, encode(tokenizer, task, Examples(texts, ("w1",) * 6), 40))
    written = write_texts(model, tokenizer, prompts, batch_size=4, new_tokens=4)
    labels = tuple(w if i % 2 else f"{w.split()[0]} w0 w1" for i, w in enumerate(written))
    examples = Examples(texts, labels, np.arange(6))
    evaluator = Evaluator(chat_base, {"talk": task}, {"talk": examples}, 4, 40)
    measured = evaluator.predict("talk", {})
    rows = evaluator.score_rows(
        measured, "talk", np.arange(6), arm="", adapter="", method="", scale=1.0, seed=0, split=""
    )
    found = {r.metric: r.value for r in rows}
    longest = max(len(tokenizer(y)["input_ids"]) for y in labels) + 1  # its end included
    again = write_texts(model, tokenizer, prompts, batch_size=2, new_tokens=longest)
    rouge = np.mean([rouge_l(w, y) for w, y in zip(again, labels, strict=True)])
    assert math.isclose(found["rouge_l"], rouge, rel_tol=1e-5) and 0 < rouge < 100
    assert measured.shape == (6, 4) and found["exact_match"] == 0.0  # this model never ends a turn
    monkeypatch.setattr("plait.evaluation.text.write_texts", lambda *_, **__: [*labels[:2], *"abcd"])
    assert math.isclose(score("exact_match", evaluator.predict("talk", {}), np.full(6, -1)), 100 / 3, rel_tol=1e-6)
    monkeypatch.undo()
    truth = perplexity(model, tokenizer, task, examples, batch_size=3, max_length=40)
    assert math.isclose(found["likelihood"], 100 / truth, rel_tol=1e-4)
    part = evaluator.predict("talk", {}, rows=np.array([5, 1]))
    np.testing.assert_allclose(part, measured[[5, 1]], atol=1e-3)


def test_bootstrap_of_open_answers_agrees():
    from plait.evaluation.bootstrap import weighted_score
    from plait.tasks.metrics import OPEN

    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 9, 20)
    measured = np.stack([rng.integers(0, 2, 20), 100 * rng.random(20), -rng.random(20) * tokens, tokens], 1)
    labels, weights = np.full(20, OPEN), rng.multinomial(20, np.full(20, 0.05), 3).astype(float)
    for metric in ("exact_match", "rouge_l", "likelihood"):
        whole = weighted_score([metric], measured, labels, np.ones((1, 20)))[0]
        assert math.isclose(whole, score(metric, measured, labels))
        for w, value in zip(weights, weighted_score([metric], measured, labels, weights), strict=True):
            repeated = np.repeat(np.arange(20), w.astype(int))
            assert math.isclose(value, score(metric, measured[repeated], labels[repeated]))


def test_chat_and_written_answers_walk_the_line(chat_base, tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("one", "two")):
        for split, rows in (("train", 32), ("validation", 12)):
            lines = []
            for _ in range(rows):
                t = int(rng.integers(2))
                words = " ".join(WORDS[w] for w in [t + 2 * i, *rng.integers(10, 55, 4)])
                talk = [{"role": "user", "content": words}, {"role": "assistant", "content": f"{WORDS[t + 4]} w{t}"}]
                lines.append(json.dumps({"messages": talk}))
            (tmp_path / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = [
        {"name": n, "kind": "causal", "chat": "messages", "text": ["messages"], "train": f"{n}-train.jsonl",
         "validation": f"{n}-validation.jsonl", **more}
        for n, more in (("one", {}), ("two", {"metrics": ["rouge_l", "likelihood"]}))
    ]  # fmt: skip
    raw = {
        "name": "chat", "base": {"model": chat_base.name, "device": "cpu"}, "tasks": tasks,
        "data": {"root": str(tmp_path), "max_length": 32}, "arms": ["kaiming"],
        "lora": {"rank": 4, "target_modules": list(TARGETS["llama"])}, "statistics": {"samples": 12},
        "training": {"steps": 60, "batch_size": 8, "lr": 0.03}, "merges": ["task_arithmetic"], "fleet": "always",
        "evaluation": {"scales": [1.0], "resamples": 20},
    }  # fmt: skip
    run(parse_recipe(raw, "chat"), tmp_path / "out", quiet=True)
    rows = parquet.read_table(tmp_path / "out/report/scores.parquet").to_pylist()
    reported = [r for r in rows if r["split"] in ("A", "B")]
    assert {(r["task"], r["metric"]) for r in reported} == {
        ("one", "exact_match"), ("one", "score"), ("two", "rouge_l"), ("two", "likelihood"), ("two", "score"),
    }  # fmt: skip
    means = {
        (kind, task): np.mean(
            [r["value"] for r in reported if (r["adapter"], r["task"], r["metric"]) == (kind, task, "score")]
        )
        for kind in ("alone", "floor")
        for task in ("one", "two")
    }
    assert means["alone", "two"] > means["floor", "two"] + 10  # it has learnt to speak
