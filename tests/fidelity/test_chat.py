"""Chat and instruct adapters: prompts through the tokenizer's template, adapters followed in their own answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import write_adapter
from plait.choosing.auto import AutoSettings, merge_auto
from plait.cli import main
from plait.disk.store import read_manifest
from plait.errors import InputError, UsageError
from plait.evaluation.writing import Writers, endings, write_ids
from plait.fidelity.chat import chat_of, conversation_of, prompt_ids, template_used
from plait.fidelity.own_answers import answer_rows
from plait.fidelity.panel import WRITTEN
from plait.fidelity.ready_panel import ready_panel
from plait.fidelity.score import fidelities
from plait.fidelity.texts import parse_files, read_place
from plait.fidelity.tokens import rows_of
from plait.learning.repair import repaired
from plait.merging import merge
from plait.model.applied import applied
from plait.tasks.chat import packed_prompt
from plait.tasks.task import IGNORED
from tests.panels import adapters_of
from tests.tasks.test_chat import TEMPLATE

TALK = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
]


@pytest.fixture
def asked(make_panel):
    """asked(new_tokens=5) -> a panel of prompts for two tiny decoders, at the adapters' own answers."""

    def make(architecture: str = "llama", texts: int = 7, new_tokens: int = 5, chat: bool = True):
        panel = make_panel(architecture, "causal", texts=texts, positions=WRITTEN, chat=chat, new_tokens=new_tokens)
        panel.tokenizer.chat_template = TEMPLATE
        return panel

    return make


def test_a_prompt_looks_as_the_tokenizer_renders_it(asked):
    tokenizer = asked().tokenizer
    turns = [{"role": "user", "content": "w1 w2"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, ("w1 w2",), chat=True) == list(expected)
    packed = packed_prompt(TALK, "here")
    expected = tokenizer.apply_chat_template(TALK[:2], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, (packed,), chat=True) == list(expected)  # its last answer is not needed
    assert packed_prompt(TALK[:2], "here") == packed and conversation_of((packed,)) == TALK[:2]
    assert conversation_of(('[{"a": 1}]',)) == [{"role": "user", "content": '[{"a": 1}]'}]
    with pytest.raises(InputError, match="not a list of messages"):
        packed_prompt(TALK[2:], "here")  # nothing but an answer


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_what_generate_writes(asked, architecture):
    panel = asked(architecture, new_tokens=6)
    part = panel.parts[0]
    model, rows = panel.model(part), answer_rows(panel, part)
    for row in rows:
        start = sum(t == IGNORED for t in row["labels"])
        prompt = torch.tensor([row["input_ids"][:start]])
        with torch.no_grad(), applied(model, part.adapter):
            written = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                pad_token_id=panel.tokenizer.pad_token_id,
            )  # fmt: skip
        assert row["labels"][start:] == row["input_ids"][start:] == written[0, start:].tolist()


def test_what_is_drawn_follows_the_models_probabilities(asked):
    panel = asked()
    model = panel.model(panel.parts[0])
    prompt, ends = [5, 6, 7], endings(model, panel.tokenizer, None, torch.device("cpu"))
    writers = Writers(model, panel.tokenizer, ends, 1, draws=torch.Generator().manual_seed(3))
    with applied(model, panel.parts[0].adapter):
        drawn = write_ids(writers, [prompt] * 3000)[0]
        with torch.no_grad():
            chances = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = Counter(ids[0] for ids in drawn)
    off = sum(abs(counts[i] / 3000 - float(p)) for i, p in enumerate(chances)) / 2
    assert off < 0.12 and len(counts) > 10


def test_it_is_measured_at_the_tokens_of_the_own_answer(asked):
    """Against the definition, one prompt at a time."""
    panel = asked()
    part, merged = panel.parts[0], panel.parts[1].adapter
    model = panel.model(part)
    kl, agree, n, whole = 0.0, 0, 0, 0
    for row in rows_of(panel, part):
        ids, start = torch.tensor([row["input_ids"]]), sum(t == IGNORED for t in row["labels"])
        logs = []
        for worn in (part.adapter, merged):
            with torch.no_grad(), applied(model, worn, 1.0 if worn is part.adapter else 0.2):
                logs.append(model(ids).logits[0, start - 1 : -1].log_softmax(-1))
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        answer = torch.tensor(row["input_ids"][start:])
        assert torch.equal(logs[0].argmax(-1), answer)
        hits = logs[1].argmax(-1) == answer
        agree, n, whole = agree + int(hits.sum()), n + len(answer), whole + bool(hits.all())
    found = next(t for t in fidelities(panel, [(merged, 0.2)])[0].tasks if t.task == "one")
    assert found.n == n and found.kl == pytest.approx(kl / n, rel=1e-3)
    assert found.agreement == pytest.approx(agree / n) and found.verbatim == pytest.approx(whole / 7)
    own = next(t for t in fidelities(panel, [(part.adapter, 1.0)])[0].tasks if t.task == "one")
    assert own.agreement == own.verbatim == 1.0 and own.kl == pytest.approx(0, abs=1e-6)


def test_word_for_word_is_what_the_merge_writes_itself(asked):
    panel = asked(texts=12, new_tokens=3)
    part = panel.parts[0]
    near = merge(adapters_of(panel), "task_arithmetic", weights=[1.0, 0.25], scale=1.0).adapter
    model, ends = panel.model(part), endings(panel.model(part), panel.tokenizer, None, torch.device("cpu"))
    rows = answer_rows(panel, part)
    prompts = [[t for t, label in zip(r["input_ids"], r["labels"], strict=True) if label == IGNORED] for r in rows]
    with applied(model, near):
        written = write_ids(Writers(model, panel.tokenizer, ends, 3), prompts)[0]
    same = sum(ids == [t for t in row["labels"] if t != IGNORED] for ids, row in zip(written, rows, strict=True))
    found = next(t for t in fidelities(panel, [(near, 1.0)])[0].tasks if t.task == "one")
    assert found.verbatim == pytest.approx(same / 12) and 0 < same < 12


def test_answers_are_written_once(asked, monkeypatch):
    from plait.fidelity import own_answers

    panel = asked()
    before = rows_of(panel, panel.parts[0])
    monkeypatch.setattr(own_answers, "write_ids", None)
    few = panel.with_texts(
        {t: rows[2:4] for t, rows in panel.texts.items()} | {"two": panel.texts["two"][:1]}, general=False
    )
    assert rows_of(few, few.parts[0]) == before[2:4]


def test_advice_has_every_answer_written_once(asked, monkeypatch):
    """Of what the choice reads, too, which is a part of what is asked at first."""
    from plait.advice.advise import AdviceSettings, advise
    from plait.fidelity import own_answers

    panel, prompts = asked(texts=5, new_tokens=3, chat=False), []

    def counting(writers, asked_now):
        prompts.extend(map(tuple, asked_now))
        return write_ids(writers, asked_now)

    monkeypatch.setattr(own_answers, "write_ids", counting)
    settings = AdviceSettings(repair=0, refine=0, max_length=24, answers=True, chat=False, new_tokens=3)
    advise(adapters_of(panel), panel.base, panel.texts, settings=settings)
    assert len(prompts) == 2 * 5


def test_a_repair_learns_at_the_own_answers(asked):
    panel = asked(texts=4)
    panel = replace(
        panel, texts={t: tuple(x for x in rows for _ in range(4)) for t, rows in panel.texts.items()}, _own=None
    )
    panel.tokenizer.chat_template = TEMPLATE
    start = merge(adapters_of(panel), "task_arithmetic", scale=0.3).adapter
    done, record = repaired(panel, start, 30, rate=1e-2)
    before, after = fidelities(panel, [(start, 1.0), (done, 1.0)])
    assert record.kept and after.score > before.score


def test_who_decides(make_panel):
    panel = make_panel("llama", "causal")
    adapters, tokenizer = adapters_of(panel), panel.tokenizer
    bare = make_panel("gpt2", "causal").tokenizer
    tokenizer.chat_template, bare.chat_template = TEMPLATE, None
    found, forced = chat_of(None, None, adapters, tokenizer, 9), chat_of(True, False, adapters, tokenizer, 9)
    assert (
        found.used
        and found.record.detected
        and "the tokenizer has one (--no-chat" in found.notes[0]
        and "--no-answers" in found.notes[0]
    )
    assert forced.used and not forced.record.detected and forced.record.new_tokens == 9
    for chat, without in ((False, tokenizer), (None, bare)):
        raw = chat_of(chat, True, adapters, without, 9)
        assert raw.answered and not raw.used and raw.record.template == "" and not raw.record.detected
    assert not chat_of(None, False, adapters, tokenizer, 9).answered
    classifiers = [replace(a, task_type="SEQ_CLS") for a in adapters]
    assert not chat_of(None, None, classifiers, tokenizer, 9).answered
    with pytest.raises(UsageError, match="no chat template"):
        chat_of(True, None, adapters, bare, 9)
    for chat, answers in ((True, False), (None, True)):
        with pytest.raises(UsageError, match="does not write"):
            chat_of(chat, answers, classifiers, tokenizer, 9)


def test_adapters_that_were_trained_without_a_template_are_left_as_they_are(make_panel, tmp_path):
    panel = make_panel("llama", "causal")
    panel.tokenizer.chat_template = TEMPLATE
    (tmp_path / "plait.json").write_text(json.dumps({"schema": 1, "options": {"data": {"chat": None}}, "result": {}}))
    adapters = [replace(a, source={"path": str(tmp_path)}) for a in adapters_of(panel)]
    found = chat_of(None, None, adapters, panel.tokenizer, 9)
    assert found.answered and not found.used and "one, two trained without the chat template" in found.notes[0]
    assert chat_of(True, False, adapters, panel.tokenizer, 9).used


def test_one_rule_for_every_command(make_panel, tmp_path):
    """Asked for, then the merge's own record, then the trainings', then the tokenizer; and it is always said."""
    panel = make_panel("llama", "causal")
    tokenizer, adapters = panel.tokenizer, adapters_of(panel)
    bare = make_panel("gpt2", "causal").tokenizer
    tokenizer.chat_template, bare.chat_template = TEMPLATE, None
    recorded = []
    for adapter, chat in zip(adapters, ("prompt", None), strict=True):
        folder = tmp_path / adapter.name
        folder.mkdir()
        (folder / "plait.json").write_text(json.dumps({"schema": 1, "options": {"data": {"chat": chat}}, "result": {}}))
        recorded.append(replace(adapter, source={"path": str(folder)}))
    for asked, of, before, used, said in (
        (None, adapters, None, True, "the tokenizer has one"),
        (None, recorded, None, True, "one trained so, two without it"),
        (None, recorded[:1], None, True, "one trained so"),
        (None, recorded[1:], None, False, "two trained without the chat template"),
        (None, recorded, False, False, "as when the merge was chosen"),
        (True, recorded[1:], False, True, "as asked for"),
        (False, recorded[:1], True, False, "as asked for"),
    ):
        found, words = template_used(asked, of, tokenizer, before)
        assert found is used and said in words
        assert words.startswith(
            "prompts go through the tokenizer's chat template" if used else "prompts stand as they are"
        )
    found, words = template_used(None, recorded, bare, True)
    assert not found and "one trained with a chat template, and the base's tokenizer has none" in words


def test_prompts_that_are_cut_are_counted(make_panel):
    panel = make_panel("llama", "causal", texts=5)
    panel.tokenizer.chat_template = TEMPLATE
    from plait.model import views

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "load_tokenizer", lambda _: panel.tokenizer)
        small, chat = ready_panel(
            panel.base, adapters_of(panel), panel.texts, chat=True, new_tokens=3, max_length=9, on_progress=said.append
        )
    longer = {
        t: n
        for t in ("one", "two")
        if (n := sum(len(prompt_ids(panel.tokenizer, x, chat=True)) > 9 for x in panel.texts[t]))
    }
    assert chat.record.cut == longer and longer and any("cut from the left" in line for line in said)
    row = rows_of(small, small.parts[0])[0]
    assert (
        row["input_ids"][: sum(t == IGNORED for t in row["labels"])]
        == prompt_ids(panel.tokenizer, panel.texts["one"][0], chat=True)[-9:]
    )


def test_messages_are_read_from_a_table(tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": TALK, "id": i}) + "\n" for i in range(3)))
    assert read_place(str(file)) == ((packed_prompt(TALK, ""),),) * 3
    assert parse_files([f"x={file}"])["x"].columns == ("messages",)
    file.write_text(json.dumps({"messages": [{"role": "robot", "content": "x"}]}) + "\n")
    with pytest.raises(InputError, match="role 'robot'") as raised:
        read_place(str(file))
    assert "row 0" in str(raised.value)


def test_typed_and_recorded(make_panel, tmp_path, capsys, monkeypatch):
    """Detected from the files' columns; said on the screen and in the record; --no-chat reads plain texts."""
    panel = make_panel("llama", "causal", texts=5)
    base = tmp_path / "base"
    __import__("shutil").copytree(panel.base.name, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    for adapter in adapters_of(panel):
        Path(adapter.name).mkdir()
        write_adapter(Path(adapter.name), replace(adapter, base=str(base)))
        rows = "".join(json.dumps({"prompt": t[0]}) + "\n" for t in panel.texts[adapter.name])
        Path(f"{adapter.name}.jsonl").write_text(rows)
    given = [
        "base",
        "one",
        "two",
        "--text",
        "one=one.jsonl",
        "--text",
        "two=two.jsonl",
        "--refine",
        "0",
        "--max-length",
        "24",
    ]

    def typed(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, out, err = typed("merge", "auto", *given, "--tokens", "4", "--out", "talking", "--device", "cpu", "--no-fit")
    assert code == 0 and "prompts go through the tokenizer's chat template" in err and "word for word" in out
    result = read_manifest(Path("talking"))["result"]
    assert result["chat"]["detected"] and result["chat"]["new_tokens"] == 4
    assert any("chat template" in note for note in result["notes"])
    assert all(0 <= t["verbatim"] <= 1 for t in result["fidelity"]["tasks"])
    code, out, err = typed("advise", *given, "--repair", "0", "--chat", "--tokens", "4", "--device", "cpu")
    assert code == 0 and "chat template: as asked for" in out
    code, out, err = typed(
        "merge", "auto", *given, "--no-chat", "--tokens", "4", "--out", "raw", "--device", "cpu", "--no-fit"
    )
    assert (
        code == 0 and "chat template:" not in err and "followed in their own answers" in err and "word for word" in out
    )
    assert read_manifest(Path("raw"))["result"]["chat"]["template"] == ""
    assert typed("merge", "auto", *given, "--no-answers", "--chat", "--out", "x")[0] == 2
    code, out, err = typed("merge", "auto", *given, "--no-answers", "--out", "plain", "--device", "cpu", "--no-fit")
    assert code == 0 and "chat" not in read_manifest(Path("plain"))["result"] and "word for word" not in out
    assert typed("merge", "auto", "one", "two", "--chat", "--out", "x")[0] == 2
    assert typed("merge", "auto", "one", "two", "--answers", "--out", "x")[0] == 2


def test_settings(make_panel):
    with pytest.raises(UsageError, match="at least 1"):
        AutoSettings(new_tokens=0)
    panel = make_panel("bert", "classification", texts=4)
    with pytest.raises(UsageError, match="does not write"):
        merge_auto(adapters_of(panel), panel.base, panel.texts, settings=AutoSettings(chat=True))
