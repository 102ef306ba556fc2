"""What a model writes or chooses for a row is its own: neither other rows nor settings for generation change it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.evaluation.text import prompts_of, token_likelihoods, write_texts
from plait.model.base import BaseModel
from plait.tasks import encode
from tests.tiny import make_examples, make_task, save_tokenizer


def open_task(kind="causal", **options):
    return dataclasses.replace(make_task(kind=kind), metrics=("exact_match", "rouge_l"), **options)


def ragged(examples):
    """Rows of many lengths, the shortest first."""
    texts = tuple((" ".join(t[0].split()[: 2 + i]),) for i, t in enumerate(examples.texts))
    return dataclasses.replace(examples, texts=texts)


@pytest.fixture(scope="module", params=["Bart", "M2M100", "Blenderbot"])
def bart(tmp_path_factory, request):
    """An encoder-decoder with absolute positions, whose settings ask for beams; the last two classes shift no labels by themselves."""
    folder = tmp_path_factory.mktemp("bart")
    words = save_tokenizer(folder, "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "max_position_embeddings": 64, "init_std": 0.3}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = getattr(transformers, f"{request.param}Config")(vocab_size=words, **sizes, **ids)
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config)
    model.generation_config.num_beams = 3
    model.save_pretrained(folder)
    return BaseModel(str(folder), device="cpu")


def test_an_encoder_with_absolute_positions_scores_every_row_as_alone(bart):
    task = dataclasses.replace(make_task(kind="seq2seq"), labels=("w0 w3", "w1 w4"))
    examples = ragged(make_examples(task, 8))
    alone, together = (
        Evaluator(bart, {"topic": task}, {"topic": examples}, n, 40).predict("topic", {}) for n in (1, 8)
    )
    assert np.ptp(alone) > 0.1
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_answers_are_read_as_the_model_itself_reads_labels(bart):
    task = open_task("seq2seq")
    examples = make_examples(task, 1)
    evaluator = Evaluator(bart, {"topic": task}, {"topic": examples}, 1, 40)
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    row = encode(tokenizer, task, examples, 40)
    with torch.no_grad():
        loss = float(model(**{k: torch.tensor([v]) for k, v in row[0].items()}).loss)
    assert token_likelihoods(model, tokenizer, task, row, 1)[0] == pytest.approx(
        [-loss * len(row[0]["labels"]), len(row[0]["labels"])]
    )


def test_an_encoder_with_absolute_positions_writes_every_row_as_alone(bart):
    task = open_task("seq2seq")
    examples = ragged(make_examples(task, 8))
    evaluator = Evaluator(bart, {"topic": task}, {"topic": examples}, 1, 40)
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    prompts = prompts_of(task, encode(tokenizer, task, examples, 40))
    alone, together = (write_texts(model, tokenizer, prompts, batch_size=n, new_tokens=12) for n in (1, 8))
    assert alone == together and len(set(alone)) > 1
    ids = torch.tensor([prompts[0]])
    written = torch.tensor([[2]])
    with torch.no_grad():  # the likeliest token at every step, by hand
        for _ in range(12):
            token = model(input_ids=ids, decoder_input_ids=written).logits[:, -1].argmax(-1, keepdim=True)
            written = torch.cat([written, token], 1)
            if int(token) == 2:
                break
    assert alone[0] == tokenizer.decode(written[0, 1:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("asked", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}, {"num_beams": 4}])
def test_settings_for_generation_do_not_change_a_score(tiny_base, asked):
    task = open_task()
    examples = make_examples(task, 9)
    evaluator = Evaluator(tiny_base("llama"), {"topic": task}, {"topic": examples}, 5, 40)
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    prompts = prompts_of(task, encode(tokenizer, task, examples, 40))
    before = write_texts(model, tokenizer, prompts, new_tokens=12)
    model.generation_config.update(**asked)
    settings = model.generation_config
    assert write_texts(model, tokenizer, prompts, new_tokens=12) == before
    assert model.generation_config is settings
    alone, beside = evaluator.predict("topic", {}), predict_many(evaluator, "topic", [Candidate({})])[0]
    np.testing.assert_array_equal(alone[:, :2], beside[:, :2])


def test_the_tokenizers_end_token_ends_an_answer_too(tiny_base):
    task = open_task()
    examples = make_examples(task, 3)
    evaluator = Evaluator(tiny_base("llama"), {"topic": task}, {"topic": examples}, 5, 40)
    model, tokenizer = evaluator.task_model("topic"), evaluator.tokenizer
    prompts = prompts_of(task, encode(tokenizer, task, examples, 40))
    whole = write_texts(model, tokenizer, prompts[:1], new_tokens=8)[0].split()
    assert len(whole) == 8
    kept, tokenizer.eos_token = (
        tokenizer.eos_token,
        whole[0],
    )  # as of a chat model whose turns end otherwise than its texts
    try:
        written = write_texts(model, tokenizer, prompts[:1], new_tokens=8)[0].split()
    finally:
        tokenizer.eos_token = kept
    assert written == whole[:1]


def test_what_is_written_after_a_row_does_not_depend_on_the_rows_beside_it(tiny_base):
    task = open_task()
    examples = make_examples(task, 4)
    examples = dataclasses.replace(examples, labels=(*examples.labels[:3], "w1 w2 w3 w4 w5 w6 w7 w8"))
    evaluator = Evaluator(tiny_base("llama"), {"topic": task}, {"topic": examples}, 5, 40)
    some = np.array([0, 2])
    np.testing.assert_array_equal(evaluator.predict("topic", {}, rows=some), evaluator.predict("topic", {})[some])
    one, all_rows = (predict_many(evaluator, "topic", [Candidate({})], rows)[0] for rows in (some, None))
    np.testing.assert_array_equal(one, all_rows[some])
    assert evaluator.new_tokens("topic") == 9


def test_a_model_may_write_as_much_as_the_longest_of_several_right_answers(tiny_base):
    task = open_task(references="others")
    examples = dataclasses.replace(make_examples(task, 2), references=(("w1",), ("w1 w2 w3 w4 w5",)))
    evaluator = Evaluator(tiny_base("llama"), {"topic": task}, {"topic": examples}, 5, 40)
    assert evaluator.new_tokens("topic") == 6
