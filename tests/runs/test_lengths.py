"""What `data.max_length` cuts is counted before a run, said, and kept; an answer that does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from plait.cli import main
from plait.disk.store import read_json, read_manifest
from plait.errors import InputError
from plait.model.base import load_tokenizer
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import report_again, run
from plait.runs import lengths
from plait.runs.folder import layout_of_folder
from plait.runs.forecast import describe
from plait.runs.lengths import cut_of_rows
from plait.runs.session import Session
from plait.tasks import Examples, Source, Task
from plait.tasks.encoding import encode_counted
from plait.tasks.lengths import Cut
from tests.tiny import WORDS

LIMIT = 12
SHORT, LONG, ANSWER = " ".join(WORDS[:4]), " ".join(WORDS[:30]), '{"intent": "w1"}'  # of WORDS a token each


@pytest.fixture
def text_recipe(tiny_base, tmp_path):
    """A run of two causal tasks on a tiny Llama: 3 of 8 training and 1 of 4 validation prompts of "said" are long."""

    def make(answer: str = ANSWER):
        for split, longs in (("train", (0, 3, 5)), ("validation", (2,))):
            for name in ("said", "short"):
                rows = [
                    {
                        "q": f"{LONG if name == 'said' and i in longs else SHORT} w{i}",
                        "answer": answer,
                        "all": [answer, "w3"],
                    }
                    for i in range(8 if split == "train" else 4)
                ]
                (tmp_path / f"{name}-{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        tasks = [
            {"name": n, "kind": "causal", "text": "q", "label": "answer", "train": f"{n}-train.jsonl",
             "validation": f"{n}-validation.jsonl", "metrics": ["slot_f1", "rouge_l"], "references": "all"}
            for n in ("said", "short")
        ]  # fmt: skip
        raw = {
            "name": "text", "base": {"model": tiny_base("llama").name, "device": "cpu"}, "tasks": tasks,
            "data": {"root": str(tmp_path), "max_length": LIMIT}, "arms": ["kaiming"],
            "lora": {"rank": 2, "target_modules": ["q_proj"]}, "merges": ["task_arithmetic"], "fleet": "always",
            "training": {"steps": 2, "batch_size": 4, "lr": 0.01}, "evaluation": {"scales": [1.0], "resamples": 5},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
        return parse_recipe(raw, "text")

    return make


def test_a_run_counts_says_and_keeps_what_is_cut(text_recipe, tmp_path, capsys):
    recipe, out = text_recipe(), tmp_path / "out"
    forecast = describe(recipe, out)
    tokens = len(load_tokenizer(Session(recipe).base)(f" {ANSWER}")["input_ids"]) + 1
    longest = 31 + tokens
    assert forecast.cut["said"] == {"train": Cut(8, 3, LIMIT, longest), "validation": Cut(4, 1, LIMIT, longest)}
    assert [c.cut for c in forecast.cut["short"].values()] == [0, 0] and 5 + tokens <= LIMIT
    whole = 8 * -(-longest // 8)
    said = f"3 of 8 prompts of said are cut at {LIMIT} tokens; data.max_length: {whole} would hold all (training rows)"
    assert forecast.cut_said[0] == said and len(forecast.cut_said) == 2
    run(recipe, out, quiet=True)
    assert f"note: {said}\n" in capsys.readouterr().err
    assert read_json(out / "inputs.json")["cut"] == {
        "said": {
            "train": {"rows": 8, "cut": 3, "limit": LIMIT, "longest": longest},
            "validation": {"rows": 4, "cut": 1, "limit": LIMIT, "longest": longest},
        }
    }
    adapters = out / "adapters/kaiming/seed-0"
    assert read_manifest(adapters / "said")["result"]["cut"]["cut"] == 3
    assert "cut" not in read_manifest(adapters / "short")["result"]
    page = (out / "report/report.html").read_text(encoding="utf-8")
    assert said in page
    assert layout_of_folder(out).cuts == {"said": forecast.cut["said"]}
    report_again(out)  # from the folder alone
    assert said in (out / "report/report.html").read_text(encoding="utf-8")
    raised = text_recipe().model_copy(update={"data": recipe.data.model_copy(update={"max_length": whole})})
    assert describe(raised, tmp_path / "other").cut_said == []


def test_single_stages_say_it_too(text_recipe, tmp_path, capsys):
    text_recipe()
    recipe = ["--recipe", str(tmp_path / "recipe.yaml"), "--json"]
    stats, start, trained = (str(tmp_path / n) for n in ("said.stats.safetensors", "start", "trained"))

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words, *recipe] if "init" not in words else [*words, "--json"])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return json.loads(printed.out), printed.err

    found, err = call("stats", "--task", "said", "--out", stats)
    assert found["cut"]["cut"] == 3 and "3 of 8 prompts of said are cut" in err
    call("init", "--own", stats, "--method", "kaiming", "--rank", "2", "--out", start)
    found, err = call("train", start, "--task", "said", "--out", trained, "--quiet")
    assert found["cut"]["cut"] == 3 and err.count("3 of 8 prompts of said are cut") == 1
    found, err = call("eval", f"said={trained}", "--quiet")
    assert (
        found["adapters"][0]["tasks"]["said"]["cut"]["cut"] == 1 and "cut" not in found["adapters"][0]["tasks"]["short"]
    )
    assert err.count("1 of 4 prompts of said is cut") == 1
    found, _ = call("stats", "--task", "short", "--out", str(tmp_path / "short.stats.safetensors"))
    assert "cut" not in found


def test_an_answer_that_does_not_fit_is_refused_before_anything(text_recipe, tmp_path):
    recipe = text_recipe(json.dumps({"intent": " ".join(WORDS[:20])}))
    for attempt in (describe, run):
        with pytest.raises(InputError, match="8 of 8 answers do not fit max_length 12") as raised:
            attempt(recipe, tmp_path / "out")
        assert raised.value.where == "task said, row 0" and "--set data.max_length=" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_of_many_rows_a_sample_is_counted(text_recipe, monkeypatch):
    session = Session(text_recipe())
    monkeypatch.setattr(lengths, "COUNTED", 5)
    cut = cut_of_rows(session, "said", session.training("said", 0), scored=False)
    assert (cut.rows, cut.total) == (5, 8) and 0 <= cut.cut <= 3
    assert ", drawn of 8, are cut" in replace(cut, cut=2).said(session.tasks["said"])


def test_what_is_cut_of_every_kind(tiny_base):
    tokenizer = load_tokenizer(tiny_base("bert"))
    one = Task("t", "classification", Source("none"), ("text",), labels=("a", "b"))
    rows = Examples(((LONG,), (SHORT,)), np.arange(2))
    encoded, cut = encode_counted(tokenizer, one, rows, 16)
    assert cut == Cut(2, 1, 16, 32) and [len(r["input_ids"]) for r in encoded] == [16, 6]
    assert cut.said(one) == "1 of 2 texts of t is cut at 16 tokens; data.max_length: 32 would hold all"
    tokenizer.model_max_length = 24
    cut = encode_counted(tokenizer, one, rows, 16)[1]
    assert cut.said(one).endswith("; the longest has 32, and the base reads 24")
    tokenizer, written = load_tokenizer(tiny_base("t5")), replace(one, kind="seq2seq", labels=None)
    cut = encode_counted(tokenizer, written, Examples(((SHORT,), (SHORT,)), (LONG, "w1")), 16)[1]
    assert (cut.cut, cut.answers, cut.longest) == (1, 1, 31)
    assert "cut at 16 tokens (1 of them for their answers); data.max_length: 32" in cut.said(written)


def test_known_answers_are_counted_with_the_longest_of_them(tiny_base, tmp_path):
    rows = [{"q": SHORT, "answer": "w1"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {"name": "t", "kind": "causal", "text": "q", "label": "answer", "labels": ["w1", "w1 w2 w3 w4"],
            "train": "rows.jsonl", "validation": "rows.jsonl"}  # fmt: skip
    raw = {
        "base": {"model": tiny_base("llama").name, "device": "cpu"}, "tasks": [task], "arms": ["kaiming"],
        "data": {"root": str(tmp_path), "max_length": 8}, "lora": {"target_modules": ["q_proj"]},
        "training": {"steps": 1}, "merges": ["task_arithmetic"],
    }  # fmt: skip
    cuts = describe(parse_recipe(raw, "t"), tmp_path / "out").cut["t"]
    assert (cuts["train"].cut, cuts["validation"].cut) == (0, 3) and cuts["validation"].longest == 9
