"""`plait try`: what is shown is what PEFT and transformers answer, and what cannot be asked is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.choosing.auto_folders import merge_auto_folders
from plait.disk.store import identity, staged_folder
from plait.merging import merge_folders
from plait.trying.prompts import read_files, read_prompts
from tests.classifiers import expected_logits, quiet, saved_base, saved_classifier
from tests.command import call
from tests.merging.test_bake import llama, lora
from tests.tiny import WORDS, save_tokenizer

PROMPTS = [" ".join(WORDS[i : i + n]) for i, n in ((0, 3), (4, 6), (2, 1))]
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


def answers(capsys, *arguments) -> dict:
    code, said, err = call(capsys, "try", *arguments, "--json")
    assert code == 0, err
    found: dict = json.loads(said)
    return found


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """(base, two adapters of a language model, their merge)."""
    root = tmp_path_factory.mktemp("writers")
    base = llama(root / "base")
    (base / "tokenizer.json").unlink()
    save_tokenizer(base, "llama")
    pair = [lora(base, root / n, ["q_proj", "v_proj", "up_proj"], seed=i) for i, n in enumerate(("one", "two"))]
    merge_folders(pair, root / "merged", method="task_arithmetic", scale=1.0)
    return base, pair, root / "merged"


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """(base, two classifiers, their merge)."""
    root = tmp_path_factory.mktemp("classifiers")
    base = saved_base(root / "base", "bert")
    pair = [saved_classifier(root / n, base, "bert", 2 + i, seed=i) for i, n in enumerate(("mood", "topic"))]
    merge_folders(pair, root / "merged", method="task_arithmetic", scale=1.0)
    return base, pair, root / "merged"


def written_by_transformers(base: Path, adapter: Path | None, prompt: str, tokens: int, **render) -> str:
    """Greedy answer of the base with PEFT's own loading of the adapter."""
    import peft
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    with quiet(), torch.no_grad():
        model = hf.AutoModelForCausalLM.from_pretrained(base).eval()
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()
        ids = torch.tensor([render["ids"]]) if render else tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_text_is_what_transformers_and_peft_write(writers, tmp_path, capsys):
    base, pair, merged = writers
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    found = answers(capsys, merged, "--prompts", tmp_path / "prompts.txt", "--tokens", "7", "--device", "cpu")
    assert found["columns"] == ["the bare base", "one", "two", "the merge"]
    assert [r["prompt"] for r in found["rows"]] == PROMPTS and found["missing"] == []
    for row in found["rows"]:
        wanted = [written_by_transformers(base, a, row["prompt"], 7) for a in (None, *pair, merged)]
        assert [a["text"] for a in row["answers"]] == wanted
    assert len({a["text"] for r in found["rows"] for a in r["answers"]}) > 3  # the adapters do change what is written


def test_a_class_and_its_probability_are_pefts(classifiers, tmp_path, capsys):
    import transformers as hf

    base, pair, merged = classifiers
    (tmp_path / "more.csv").write_text(f"text\n{PROMPTS[1]}\n")
    found = answers(
        capsys, merged, "--prompt", PROMPTS[0], "--prompts", f"topic={tmp_path / 'more.csv'}", "--device", "cpu"
    )
    assert [(r["task"], r["prompt"]) for r in found["rows"]] == [
        ("mood", PROMPTS[0]), ("topic", PROMPTS[0]), ("topic", PROMPTS[1]),
    ]  # fmt: skip
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    for row in found["rows"]:
        place = ["mood", "topic"].index(row["task"])
        inputs = dict(tokenizer(row["prompt"], return_tensors="pt"))
        wanted = [expected_logits(base, members, pair[place], 2 + place, inputs) for members in ([pair[place]], pair)]
        for answer, logits in zip(row["answers"][1:], wanted, strict=True):
            chances = logits.softmax(-1)[0]
            assert answer["text"] == f"LABEL_{int(chances.argmax())}"
            assert abs(answer["probability"] - float(chances.max())) < 1e-5
    code, said, _ = call(capsys, "try", merged, "--prompt", PROMPTS[0], "--device", "cpu")
    assert code == 0 and "the bare base" in said and "its adapter" in said
    assert said.count(PROMPTS[0]) == 1  # once, whatever the number of tasks
    lines = [line.split()[0] for line in said.splitlines() if "the bare base  " in line]
    assert lines == ["mood", "topic"], said
    page = tmp_path / "classes.html"
    assert call(capsys, "try", merged, "--prompt", PROMPTS[0], "--device", "cpu", "--out", page)[0] == 0
    html = page.read_text()
    assert html.count(f"<h2>{PROMPTS[0]}</h2>") == 1 and "<h3>mood</h3>" in html and "1 prompt to" in html


def test_rows_that_name_a_task_are_asked_of_it_alone(classifiers, writers, tmp_path, capsys):
    """Each answer is the one that its task gives when it is asked by itself; a row that names none goes to everybody."""
    rows = tmp_path / "rows.csv"
    rows.write_text("text,task\n" + "".join(f"{p},{t}\n" for p, t in zip(PROMPTS, ("topic", "", "mood"), strict=True)))
    command = (classifiers[2], "--device", "cpu")
    found = answers(capsys, *command, "--prompts", f"{rows}:text")
    wanted = [("mood", PROMPTS[1]), ("topic", PROMPTS[1]), ("mood", PROMPTS[2]), ("topic", PROMPTS[0])]
    assert [(r["task"], r["prompt"]) for r in found["rows"]] == wanted
    for row in found["rows"]:
        (tmp_path / "one.txt").write_text(row["prompt"])
        alone = answers(capsys, *command, "--prompts", f"{row['task']}={tmp_path / 'one.txt'}")
        for here, there in zip(row["answers"], alone["rows"][0]["answers"], strict=True):
            assert here["text"] == there["text"] and here["probability"] == pytest.approx(there["probability"])
        assert [r["task"] for r in alone["rows"]] == [row["task"]]
        assert not any("every head answers" in note for note in alone["notes"])
    assert any(n.startswith("every head answers 1 prompt, whatever") for n in found["notes"])

    rows.write_text(f"prompt,task\n{PROMPTS[0]},two\n{PROMPTS[1]},\n")
    command = (writers[2], "--tokens", "5", "--device", "cpu")
    found = answers(capsys, *command, "--prompts", rows)
    everybody = answers(capsys, *command, "--prompt", PROMPTS[1], "--prompt", PROMPTS[0])
    assert found["rows"][0] == everybody["rows"][0] and found["rows"][0]["task"] is None
    assert found["rows"][1]["task"] == "two" and found["rows"][1]["columns"] == ["the bare base", "two", "the merge"]
    base, _, *others = everybody["rows"][1]["answers"]
    assert found["rows"][1]["answers"] == [base, *others]
    page = tmp_path / "rows.html"
    code, said, _ = call(capsys, "try", *command, "--prompts", rows, "--out", page)
    assert (
        code == 0
        and said.count("the bare base  ") == 2
        and sum("   two  the bare base" in x for x in said.splitlines()) == 1
    )
    assert page.read_text().count("<dt>one</dt>") == 1 and page.read_text().count("<dt>two</dt>") == 2


def test_a_column_of_other_tasks_and_rows_that_are_not_asked_are_told(classifiers, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,task\n" + "w1 w2,summarise\n" * 120)
    asked = read_prompts(read_files([str(rows)]), [], ["mood", "topic"])
    assert len(asked.for_all) == 100 and not asked.of_tasks
    assert asked.notes == (
        "rows.csv: column 'task' names no task of this merge (summarise), so its rows are for everybody",
        "rows.csv: the first 100 of each task of 120 rows are asked",
    )
    rows.write_text("text,task\n" + "w1 w2,mood\n" * 120 + "w3,topic\n")
    asked = read_prompts(read_files([str(rows)]), [], ["mood", "topic"])
    assert {t: len(x) for t, x in asked.of_tasks.items()} == {"mood": 100, "topic": 1}  # a task that comes last too
    assert asked.notes == ("rows.csv: the first 100 of each task of 121 rows are asked",)
    (tmp_path / "long.txt").write_text("w1 " * 30 + "\nw1\n")
    found = answers(
        capsys, classifiers[2], "--prompts", f"mood={tmp_path / 'long.txt'}", "--max-length", "8", "--device", "cpu"
    )
    assert any(
        n.startswith("texts longer than 8 tokens are read up to there: 1 of 2 of mood (") for n in found["notes"]
    )


def test_adapters_that_are_gone_or_changed_are_named_and_the_rest_is_tried(writers, tmp_path, capsys):
    _, pair, _ = writers
    mine = [Path(shutil.copytree(p, tmp_path / p.name)) for p in pair]
    merge_folders(mine, tmp_path / "merged")
    moved = mine[0].rename(tmp_path / "elsewhere")
    shutil.copyfile(pair[0] / "adapter_model.safetensors", mine[1] / "adapter_model.safetensors")
    command = (tmp_path / "merged", "--prompt", PROMPTS[0], "--tokens", "2", "--device", "cpu")
    found = answers(capsys, *command)
    assert found["columns"] == ["the bare base", "the merge"]
    why = {m["name"]: m["why"] for m in found["missing"]}
    assert "is gone" in why["one"] and "has changed since" in why["two"] and "--adapter NAME=PATH" in why["one"]
    found = answers(capsys, *command, "--adapter", f"one={moved}")
    assert found["columns"] == ["the bare base", "one", "the merge"]
    found = answers(capsys, *command, "--adapter", f"one={pair[1]}")  # another one under its name
    assert found["columns"] == ["the bare base", "the merge"]
    assert "is not what was merged" in {m["name"]: m["why"] for m in found["missing"]}["one"]
    code, _, err = call(capsys, "try", *command, "--adapter", f"three={moved}")
    assert code == 2 and "no adapter 'three' in this merge" in err and "one, two" in err
    code, said, _ = call(capsys, "try", *command)
    assert "- one is not tried: " in said


def test_a_classifier_whose_adapter_is_gone_leaves_its_place_empty(classifiers, tmp_path, capsys):
    _, pair, _ = classifiers
    mine = [Path(shutil.copytree(p, tmp_path / p.name)) for p in pair]
    merge_auto_folders([str(m) for m in mine], tmp_path / "merged")
    shutil.rmtree(mine[0])
    found = answers(capsys, tmp_path / "merged", "--prompt", PROMPTS[0], "--device", "cpu")
    assert [r["answers"][1] is None for r in found["rows"]] == [True, False]
    code, said, _ = call(capsys, "try", tmp_path / "merged", "--prompt", PROMPTS[0], "--device", "cpu")
    assert code == 0 and "(not here)" in said


def test_one_adapter_is_tried_beside_the_base(writers, classifiers, capsys):
    found = answers(capsys, writers[1][0], "--prompt", PROMPTS[0], "--tokens", "2", "--device", "cpu")
    assert found["columns"] == ["the bare base", "one"]
    found = answers(capsys, classifiers[1][0], "--prompt", PROMPTS[0], "--device", "cpu")
    assert found["columns"] == ["the bare base", "mood"] and len(found["rows"][0]["answers"]) == 2


def test_the_chat_template_is_used_when_asked_and_where_adapters_were_trained_so(writers, tmp_path, capsys):
    import transformers as hf

    base, pair, _ = writers
    talking = Path(shutil.copytree(base, tmp_path / "base"))
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = hf.AutoTokenizer.from_pretrained(talking)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=False
    )
    mine = []
    for p in pair:
        data = {"chat": "prompt" if p.name == "one" else None, "template": "Q: {text}" if p.name == "two" else None}
        with staged_folder(tmp_path / p.name, identity("adapter", {"data": data})) as stage:
            write_adapter(stage, read_adapter(p))
        mine.append(tmp_path / p.name)
    merge_folders(mine, tmp_path / "merged")
    command = (tmp_path / "merged", "--base", talking, "--prompt", PROMPTS[0], "--tokens", "5", "--device", "cpu")
    found = answers(capsys, *command)
    assert "one trained so" in found["notes"][0] and "'Q: {text}'" in found["notes"][1]
    wanted = [written_by_transformers(talking, a, "", 5, ids=ids) for a in (None, *mine, tmp_path / "merged")]
    assert [a["text"] for a in found["rows"][0]["answers"]] == wanted
    plain = answers(capsys, *command, "--no-chat")
    assert plain["rows"][0]["answers"][0]["text"] == written_by_transformers(talking, None, PROMPTS[0], 5)
    code, _, err = call(
        capsys, "try", tmp_path / "merged", "--base", base, "--prompt", "x", "--chat", "--device", "cpu"
    )
    assert code == 2 and "no chat template" in err
    merge_folders(pair, tmp_path / "unknown")
    found = answers(
        capsys, tmp_path / "unknown", "--base", talking, "--prompt", PROMPTS[0], "--tokens", "5", "--device", "cpu"
    )
    assert "the tokenizer has one (--no-chat" in found["notes"][0]
    assert found["rows"][0]["answers"][0]["text"] == written_by_transformers(talking, None, "", 5, ids=ids)


@pytest.mark.parametrize("chat", [None, False])
def test_a_merge_is_asked_as_it_was_when_it_was_chosen(writers, tmp_path, monkeypatch, capsys, chat):
    base, pair, _ = writers
    talking = Path(shutil.copytree(base, tmp_path / "base"))
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    texts = [f"--text={p.name}={tmp_path / p.name}.csv:prompt" for p in pair]
    for p in pair:
        (tmp_path / f"{p.name}.csv").write_text("prompt\n" + "".join(f"w{i} w{i + 1}\n" for i in range(20)))
    more = ["--no-chat"] if chat is False else []
    code, said, err = call(
        capsys, "merge", "auto", talking, *pair, *texts, *more, "--refine", "0", "--no-fit", "--tokens", "3", "--device", "cpu",
        "--out", tmp_path / "merged",
    )  # fmt: skip
    assert code == 0, err
    sentence = "prompts stand as they are" if more else "prompts go through the tokenizer's chat template"
    assert sentence in said + err
    found = answers(
        capsys, tmp_path / "merged", "--base", talking, "--prompt", PROMPTS[0], "--tokens", "5", "--device", "cpu"
    )
    assert found["notes"][0].startswith(f"{sentence}: as when the merge was chosen")


def test_an_answer_follows_a_prompt_without_an_end(writers, tmp_path, capsys):
    """A tokenizer that closes every text would have the model write after an end that training never put there."""
    from tokenizers import Tokenizer, processors

    base, pair, _ = writers
    closing = Path(shutil.copytree(base, tmp_path / "base"))
    import transformers as hf

    plain = hf.AutoTokenizer.from_pretrained(base)
    backend = Tokenizer.from_file(str(closing / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {plain.eos_token}", special_tokens=[(plain.eos_token, plain.eos_token_id)]
    )
    backend.save(str(closing / "tokenizer.json"))
    ids = plain(PROMPTS[0], add_special_tokens=False)["input_ids"]
    found = answers(
        capsys, pair[0], "--base", closing, "--prompt", PROMPTS[0], "--no-chat", "--tokens", "5", "--device", "cpu"
    )
    assert found["rows"][0]["answers"][0]["text"] == written_by_transformers(base, None, "", 5, ids=ids)


def test_models_whose_updates_do_not_stack_are_asked_one_by_one(tmp_path, capsys):
    import peft
    import transformers as hf

    base = llama(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    save_tokenizer(base, "llama")
    with quiet():
        model = peft.get_peft_model(
            hf.AutoModelForCausalLM.from_pretrained(base),
            peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        )
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / "words", save_embedding_layers=False)
    found = answers(capsys, tmp_path / "words", "--prompt", PROMPTS[1], "--tokens", "6", "--device", "cpu")
    wanted = [written_by_transformers(base, a, PROMPTS[1], 6) for a in (None, tmp_path / "words")]
    assert [a["text"] for a in found["rows"][0]["answers"]] == wanted and wanted[0] != wanted[1]


def test_sequence_to_sequence_models_write_too(tmp_path, capsys):
    import peft
    import transformers as hf

    base = saved_base(tmp_path / "base", "t5")
    with quiet():
        config = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        model = peft.get_peft_model(hf.AutoModelForSeq2SeqLM.from_pretrained(base), config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.5)
        model.save_pretrained(tmp_path / "a")
        found = answers(capsys, tmp_path / "a", "--prompt", PROMPTS[0], "--tokens", "5", "--device", "cpu")
        tokenizer = hf.AutoTokenizer.from_pretrained(base)
        ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
        new = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    assert found["rows"][0]["answers"][1]["text"] == tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_the_page_is_whole_names_no_folder_and_escapes_what_it_shows(writers, tmp_path, capsys, monkeypatch):
    base, _, merged = writers
    page = tmp_path / "answers.html"
    command = (
        "try",
        merged,
        "--prompt",
        "w1 <script>alert(1)</script>",
        "--tokens",
        "3",
        "--device",
        "cpu",
        "--out",
        page,
    )
    code, said, err = call(capsys, *command)
    assert code == 0 and str(page) in said, err
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "http" not in html.replace("http-equiv", "")
    assert str(base.parent) not in html and "<code>base</code>" in html
    assert html.count("<dt>") == 4 and "prefers-color-scheme: dark" in html
    assert call(capsys, *command, "--overwrite")[0] == 0
    monkeypatch.setattr(
        "plait.trying.answers.tried", lambda *_, **__: pytest.fail("asked before the place was looked at")
    )
    code, _, err = call(capsys, *command)
    assert code == 2 and "--overwrite" in err
    page.write_text("mine")
    code, _, err = call(capsys, *command, "--overwrite")
    assert code == 2 and page.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing to ask"),
        (["--prompts", "absent.txt"], 3, "no such file"),
        (["--prompt", " "], 3, "is empty"),
        (["--prompts", "nobody=p.txt"], 2, "no task of that name"),
        (["--prompts", "one=p.txt", "--prompts", "one=p.txt"], 2, "names 'one' twice"),
        (["--prompts", "mixed.csv"], 2, "column 'task' names 'three'"),
        (["--prompt", "w1 " * 60, "--max-length", "8"], 3, "at most 8 fit"),
        (["--prompt", "w1", "--tokens", "4000"], 2, "leave no room"),
        (["--prompt", "w1", "--base", "/absent"], 3, "no such folder"),
    ],
)
def test_what_cannot_be_asked_is_one_line(writers, tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("w1\n")
    Path("mixed.csv").write_text("text,task\nw1,one\nw2,three\n")
    answer, _, err = call(capsys, "try", writers[2], *arguments, "--device", "cpu")
    assert answer == code and said in err and len(err.strip().splitlines()) <= 2, err


def test_what_makes_no_answers_is_refused(classifiers, tmp_path, capsys):
    base, _, merged = classifiers
    code, _, err = call(capsys, "try", base, "--prompt", "w1")
    assert code == 3 and "a whole model" in err
    code, _, err = call(capsys, "try", merged, "--prompts", "w1=x", "--prompt", "w1", "--device", "cpu")
    assert code == 3
    code, _, err = call(capsys, "try", merged, "--prompt", "w1", "--chat", "--device", "cpu")
    assert code == 2 and "no chat" in err
