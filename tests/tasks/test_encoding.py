"""Texts to batches: lengths, both padding sides, and the masks of causal and seq2seq targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.errors import InputError
from plait.model.base import load_task_model, load_tokenizer
from plait.tasks import Examples, Source, Task, batches, collate, encode, length_order, require_positions
from tests.tiny import ARCHITECTURES, WORDS


def task(kind: str = "classification") -> Task:
    return Task("t", kind, Source("none"), ("text",), labels=("a", "b") if kind == "classification" else None)


def examples(*lengths: int, pair: bool = False) -> Examples:
    texts = tuple((" ".join(WORDS[:n]), *([" ".join(WORDS[-n:])] if pair else [])) for n in lengths)
    return Examples(texts, np.arange(len(lengths)) % 2, np.arange(len(lengths)))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_too_long_texts_are_cut_and_pairs_share_the_room(tiny_base, architecture):
    tokenizer = load_tokenizer(tiny_base(architecture))
    for row in encode(tokenizer, task(), examples(60, 3, 60, pair=True), 16):
        assert len(row["input_ids"]) <= 16 and len(row["attention_mask"]) == len(row["input_ids"])
    cut = encode(tokenizer, task(), examples(60, pair=True), 16)[0]["input_ids"]
    words = tokenizer.convert_ids_to_tokens(cut)
    assert words.count(WORDS[0]) == 2  # the beginnings of both


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(tiny_base, side):
    tokenizer = load_tokenizer(tiny_base("bert"))
    tokenizer.padding_side = side
    rows = encode(tokenizer, task(), examples(2, 7), 32)
    batch = collate(tokenizer, rows)
    short, real = rows[0]["input_ids"], batch["attention_mask"][0].bool()
    assert batch["input_ids"][0][real].tolist() == short
    assert set(batch["input_ids"][0][~real].tolist()) == {tokenizer.pad_token_id}
    assert bool(real[-1]) == (side == "left") and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(("architecture", "side"), [*((a, "right") for a in ARCHITECTURES), ("llama", "left")])
def test_padding_changes_no_logit(tiny_base, architecture, side):
    base = tiny_base(architecture)
    model, tokenizer = load_task_model(base, task(), seed=0), load_tokenizer(base)
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    rows = encode(tokenizer, task(), examples(3, 12, 7), 32)
    with torch.inference_mode():
        together = model(**{k: v for k, v in collate(tokenizer, rows).items() if k != "labels"}).logits
        for i, row in enumerate(rows):
            alone = model(**{k: v for k, v in collate(tokenizer, [row]).items() if k != "labels"}).logits
            torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_causal_masks_the_prompt_and_keeps_the_target(tiny_base):
    tokenizer = load_tokenizer(tiny_base("gpt2"))
    rows = Examples(((" ".join(WORDS[:40]),), (WORDS[0],)), ("w5 w6", "w7"), np.arange(2))
    long, short = encode(tokenizer, task("causal"), rows, 16)
    target = tokenizer("w5 w6", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(long["input_ids"]) == 16 and long["input_ids"][-3:] == target == long["labels"][-3:]
    assert set(long["labels"][:-3]) == {-100} and long["input_ids"][-4] == tokenizer.convert_tokens_to_ids(WORDS[39])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = collate(tokenizer, [long, short])
        assert batch["labels"].shape == batch["input_ids"].shape
        kept = batch["labels"] != -100
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept]) and bool(
            (batch["attention_mask"][kept] == 1).all()
        )
    with pytest.raises(InputError, match="does not fit max_length 4"):
        encode(tokenizer, task("causal"), Examples((("a",),), (" ".join(WORDS[:9]),), np.arange(1)), 4)


def test_a_tokenizer_that_ends_no_answer_is_refused(tiny_base):
    tokenizer = load_tokenizer(tiny_base("bert"))
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="names no end token"):
        encode(tokenizer, task("causal"), Examples((("w1 w2",),), ("w3",), np.arange(1)), 16)


def test_seq2seq_encodes_the_target_apart(tiny_base):
    tokenizer = load_tokenizer(tiny_base("t5"))
    rows = Examples(((" ".join(WORDS[:40]),), (WORDS[0],)), ("w5 w6", "w7"), np.arange(2))
    encoded = encode(tokenizer, task("seq2seq"), rows, 16)
    batch = collate(tokenizer, encoded)
    assert len(encoded[0]["input_ids"]) == 16 and batch["labels"].shape == (2, 3)
    assert batch["labels"][1].tolist()[-1] == -100 and batch["labels"][0].tolist()[-1] == tokenizer.eos_token_id


def test_batches_by_length_hold_every_row_once(tiny_base):
    tokenizer = load_tokenizer(tiny_base("bert"))
    rows = encode(tokenizer, task(), examples(5, 1, 9, 9, 3), 32)
    assert length_order(rows) == [2, 3, 0, 4, 1]
    for by_length in (False, True):
        found = list(batches(tokenizer, rows, 2, by_length=by_length))
        real = sorted(
            i[m.bool()].tolist() for b in found for i, m in zip(b["input_ids"], b["attention_mask"], strict=True)
        )
        assert real == sorted(r["input_ids"] for r in rows) and [len(b["labels"]) for b in found] == [2, 2, 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_41_rows_beyond_the_table_of_positions_are_refused(tiny_base, architecture):
    kind = {"t5": "seq2seq", "llama": "causal", "gpt2": "causal"}.get(architecture, "classification")
    model = load_task_model(tiny_base(architecture), task(kind), seed=0)

    def forward(length: int) -> None:
        ids = torch.full((1, length), 7)
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids[:, :1]} if kind == "seq2seq" else {}))

    forward(64)
    require_positions(model, [3, 64], "t")
    if architecture in ("t5", "llama"):  # positions are computed
        forward(65)
        require_positions(model, [65, 1000], "t")
        return
    with pytest.raises((IndexError, RuntimeError)):
        forward(65)
    with pytest.raises(InputError, match="a row of 65 tokens, and the base has 64 positions") as raised:
        require_positions(model, [3, 65], "t")
    assert "--max-length 64" in str(raised.value.hint)


def test_41_a_tokenizer_without_pads_takes_the_end_token_or_is_refused(tiny_base, tmp_path):
    import json
    import shutil

    base = tiny_base("llama")
    for missing, message in ((["pad_token"], None), (["pad_token", "eos_token"], "neither a pad nor an end-of-text")):
        folder = tmp_path / str(len(missing))
        shutil.copytree(base.name, folder)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                found = json.loads((folder / name).read_text())
                kept = {k: v for k, v in found.items() if k not in missing}
                (folder / name).write_text(json.dumps({**kept, "padding_side": "left"}))
        bare = type(base)(str(folder), device="cpu")
        if message is None:
            tokenizer = load_tokenizer(bare)
            assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "right"
            continue
        with pytest.raises(InputError, match=message):
            load_tokenizer(bare)
    with pytest.raises(InputError, match="cannot load the base model: no such folder"):
        load_tokenizer(type(base)(str(tmp_path / "absent"), device="cpu"))
