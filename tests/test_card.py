"""Model cards: valid for the hub, true of the folder, free of anybody's paths, and their lines run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.choosing.auto_folders import merge_auto_folders
from plait.cli import main
from plait.disk.card import card_of, license_of
from plait.disk.card_contents import MLX, MODEL, PEFT, CardContents, CardHead
from plait.disk.card_usage import published, usage
from plait.disk.manifest import CARD, compare_with_manifest, read_manifest
from plait.disk.store import identity, staged_folder
from plait.errors import UsageError
from plait.formats.export import export
from plait.merging import merge_folders, plan_merge
from plait.merging.bake.baking import bake
from plait.merging.words import words_of
from tests.classifiers import classifier, expected_logits, quiet, saved_base, saved_classifier
from tests.merging.test_bake import llama, lora
from tests.tiny import WORDS, save_tokenizer

LABELS = {"mood": ("sad", "glad"), "topic": ("x", "y", "z")}


def card(folder: Path) -> tuple[str, dict]:
    """The text of a folder's card, and what the hub's own parser makes of its metadata."""
    from huggingface_hub import ModelCard

    text = (folder / CARD).read_text(encoding="utf-8")
    loaded = ModelCard.load(folder / CARD)
    assert "/home" not in text and "/tmp" not in text
    return text, loaded.data.to_dict()


def run_lines(folder: Path, monkeypatch) -> dict:
    """Run the Python of a card where it says: in the folder above."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    with quiet():
        exec(compile(code, CARD, "exec"), names)
    return names


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """(base, two trained classifiers with named classes)."""
    root = tmp_path_factory.mktemp("classifiers")
    base = saved_base(root / "base", "bert")
    folders = []
    for i, (name, labels) in enumerate(LABELS.items()):
        made = read_adapter(saved_classifier(root / f"{name}-raw", base, "bert", len(labels), seed=i))
        record = {"task": name, "labels": labels, "kind": "classification", "steps": 7, "losses": {"last": 0.25}}
        with staged_folder(root / name, identity("train", {}), result=record) as stage:
            write_adapter(stage, replace(made, name=name, heads={name: made.heads[made.name]}, head_facts={}))
        folders.append(root / name)
    return base, folders


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """(base, two adapters of a language model)."""
    root = tmp_path_factory.mktemp("writers")
    base = llama(root / "base")
    (base / "tokenizer.json").unlink()
    save_tokenizer(base, "llama")
    return base, [lora(base, root / n, ["q_proj", "v_proj"], seed=i) for i, n in enumerate("ab")]


def inputs_of(base: Path) -> dict:
    import transformers as hf

    return dict(hf.AutoTokenizer.from_pretrained(base)(" ".join(WORDS[:5]), return_tensors="pt"))


def test_a_merge_of_classifiers_loads_by_its_cards_lines(classifiers, tmp_path, monkeypatch):
    base, folders = classifiers
    merge_folders(folders, tmp_path / "merged", method="task_arithmetic", scale=1.0)
    text, data = card(tmp_path / "merged")
    assert data["library_name"] == "peft" and data["tags"] == ["lora", "plait", "merge"]
    assert data["pipeline_tag"] == "text-classification" and "base_model" not in data and "license" not in data
    assert "`sad`, `glad`" in text and "Merged from 2 adapters by `task_arithmetic` at scale 1" in text
    assert str(base) not in text and f"`{base.name}`" in text
    model, inputs = run_lines(tmp_path / "merged", monkeypatch)["model"], inputs_of(base)
    wanted = expected_logits(base, folders, folders[0], 2, inputs)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    assert model.get_base_model().config.id2label == {0: "sad", 1: "glad"}


def test_a_trained_classifier_and_an_export_load_by_their_cards_lines(classifiers, tmp_path, monkeypatch):
    base, folders = classifiers
    merge_folders(folders, tmp_path / "merged", method="task_arithmetic", scale=1.0)
    export(tmp_path / "merged", tmp_path / "topic-alone", loader="peft", task="topic")
    inputs = inputs_of(base)
    for folder, sources, said in (
        (folders[1], folders[1:], "Trained on `topic` (classification) for 7 steps"),
        (tmp_path / "topic-alone", folders, "the merge of `mood`, `topic` with the head of `topic`"),
    ):
        text, data = card(folder)
        assert said in text and data["pipeline_tag"] == "text-classification"
        assert ("merge" in data["tags"]) == (len(sources) > 1)
        names = run_lines(folder, monkeypatch)
        with torch.no_grad():
            logits = names["model"].eval()(**inputs).logits
        wanted = expected_logits(base, sources, folders[1], 3, inputs)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        (answer,) = names["classify"](" ".join(WORDS[:5]))
        assert answer["label"] == "xyz"[int(wanted.argmax())]


def test_a_merge_of_language_models_loads_by_its_cards_lines(writers, tmp_path, monkeypatch):
    _, folders = writers
    merge_folders(folders, tmp_path / "merged", method="ties", options={"density": 0.5})
    text, data = card(tmp_path / "merged")
    assert data["pipeline_tag"] == "text-generation" and "density 0.5" in text
    model = run_lines(tmp_path / "merged", monkeypatch)["model"]
    assert any("lora_A" in n and float(p.abs().sum()) > 0 for n, p in model.named_parameters())
    export(tmp_path / "merged", tmp_path / "served", loader="vllm")
    assert "--max-lora-rank 8 --lora-modules served=served" in card(tmp_path / "served")[0]


def test_a_choice_tells_what_it_chose_and_where_from(classifiers, tmp_path):
    _, folders = classifiers
    written = merge_auto_folders([str(f) for f in folders], tmp_path / "merged")
    text, data = card(tmp_path / "merged")
    assert f"chose {written.record.chosen.candidate} at scale" in text and "factors alone" in text
    assert "merge" in data["tags"] and "Scores" not in text


def test_a_baked_model_has_its_own_card_and_the_bases_licence(writers, tmp_path, monkeypatch):
    base, folders = writers
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    (copy / CARD).write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# The base\n")
    bake(plan_merge([read_adapter(f) for f in folders]), copy, tmp_path / "baked")
    text, data = card(tmp_path / "baked")
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers" and "merge" in data["tags"]
    assert "# The base" not in text and "The merge of `a`, `b` by `tsv`" in text
    assert type(run_lines(tmp_path / "baked", monkeypatch)["model"]).__name__ == "LlamaForCausalLM"


def test_a_baked_merge_of_classifiers_loads_with_a_head(classifiers, tmp_path, monkeypatch):
    base, folders = classifiers
    plan = plan_merge([read_adapter(f) for f in folders], method="task_arithmetic", scale=1.0)
    said = words_of(bake(plan, base, tmp_path / "baked"))
    assert f"the lines in {tmp_path / 'baked' / CARD} put one into the model" in said and "plait export" not in said
    card(tmp_path / "baked")
    model, inputs = run_lines(tmp_path / "baked", monkeypatch)["model"], inputs_of(base)
    with torch.no_grad():
        wanted = expected_logits(base, folders, folders[0], 2, inputs)
        torch.testing.assert_close(model.eval()(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_base_on_the_hub_is_named_and_linked(classifiers, tmp_path, monkeypatch):
    _, folders = classifiers
    monkeypatch.chdir(tmp_path)
    merge_folders(folders, tmp_path / "merged", base="alice/base")
    text, data = card(tmp_path / "merged")
    assert data["base_model"] == "alice/base" and "base = 'alice/base'" in text and "PeftConfig" not in text


@pytest.mark.parametrize(
    "named", ["/home/anna/secret/bert", "../secret/bert", "~/secret/bert", "C:\\secret\\bert|`<b>"]
)
def test_no_folder_of_a_machine_is_named(classifiers, tmp_path, named):
    _, folders = classifiers
    merge_folders(folders, tmp_path / "merged", base=named)
    text, _ = card(tmp_path / "merged")
    assert "secret/" not in text and "secret\\" not in text and "<b>" not in text


def test_peft_itself_reads_and_writes_over_the_folder(classifiers, tmp_path):
    import peft

    base, folders = classifiers
    shutil.copytree(folders[0], tmp_path / "copy")
    with quiet():
        model = peft.PeftModel.from_pretrained(classifier(base, 2), tmp_path / "copy")
        model.save_pretrained(tmp_path / "copy")  # adds its own metadata to a card that it finds
    text = (tmp_path / "copy" / CARD).read_text()
    assert "## Load it" in text and "library_name: peft" in text


def test_an_edited_card_is_kept_and_not_overwritten(classifiers, tmp_path):
    _, folders = classifiers
    out = tmp_path / "merged"
    merge_folders(folders, out)
    merge_folders(folders, out, overwrite=True)  # as it was written
    (out / CARD).write_text("my own words")
    assert merge_folders(folders, out).reused and compare_with_manifest(out, read=True) == ()
    with pytest.raises(UsageError, match=r"its README.md was edited.*move README.md away"):
        merge_folders(folders, out, method="ties", overwrite=True)
    assert (out / CARD).read_text() == "my own words"
    (out / CARD).unlink()
    merge_folders(folders, out, method="ties", overwrite=True)
    assert "`ties`" in (out / CARD).read_text()


def test_the_order_of_the_inputs_is_no_part_of_the_card(classifiers, tmp_path):
    _, folders = classifiers
    merge_folders(folders, tmp_path / "one" / "m", weights=[1.0, 2.0])
    merge_folders(folders[::-1], tmp_path / "two" / "m", weights=[2.0, 1.0])
    assert card(tmp_path / "one" / "m") == card(tmp_path / "two" / "m")
    assert (read_manifest(tmp_path / "one" / "m") or {})["card"] == (read_manifest(tmp_path / "two" / "m") or {})[
        "card"
    ]


def test_what_is_no_adapter_has_no_card(tmp_path):
    with staged_folder(tmp_path / "scores", identity("scores", {})) as stage:
        (stage / "scores.json").write_text("{}")
    assert not (tmp_path / "scores" / CARD).exists()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: !!python/object:x.y {}\n---\n", None),
        ("---\nlicense: 'a\n---\n", None),
        ("---", None),
        ("license: mit", None),
    ],
)
def test_a_licence_is_taken_only_where_a_card_says_it(tmp_path, text, known):
    (tmp_path / CARD).write_text(text)
    assert license_of(tmp_path) == known


def test_lines_of_a_published_card_name_the_repository(classifiers, tmp_path):
    _, folders = classifiers
    merge_folders(folders, tmp_path / "merged")
    text = published((tmp_path / "merged" / CARD).read_text(), "merged", "alice/merged")
    assert "adapter = 'alice/merged'\n" in text and "plait export alice/merged --for peft" in text


def test_converted_and_extracted_folders_have_cards(writers, tmp_path, capsys):
    base, folders = writers
    bake(read_adapter(folders[0]), base, tmp_path / "full")
    for command in (
        ["extract", tmp_path / "full", "--base", base, "--rank", "4", "--out", tmp_path / "cut"],
        ["convert", folders[0], "--to", "mlx", "--out", tmp_path / "mlx"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in command])
        assert not ended.value.code, capsys.readouterr().err
    assert "Cut out of a full fine-tune" in card(tmp_path / "cut")[0]
    assert card(tmp_path / "mlx")[1]["library_name"] == "mlx"


EVIL = '$(touch pwned)`touch pwned`"; touch pwned #'


@pytest.mark.parametrize(("library", "loader"), [(PEFT, "vllm"), (PEFT, ""), (MLX, ""), (MODEL, "")])
def test_lines_of_a_card_run_nothing_that_a_folder_calls_itself(library, loader):
    """Names of bases and of files of heads are a stranger's words; the lines are there to be copied into a shell and into Python."""
    head = CardHead(f"x{EVIL}", 2)
    contents = CardContents(library, None, EVIL, task_type="" if library == MODEL else "SEQ_CLS", rank=2, heads=(head,))
    text = usage(contents, f"folder {EVIL}", loader)
    shell = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    python = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert shell or python
    for line in "\n".join(shell).splitlines():
        words = shlex.split(
            line, comments=True
        )  # a shell's words, nothing of it run: what is foreign is one word, or the end of one
        assert words[0] in ("vllm", "plait", "mlx_lm.generate")
        quoted = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
        assert quoted.stdout.splitlines() == words and not quoted.stderr
    for code in python:
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)}
        assert not [c for c in calls if "system" in c or "touch" in c] and "pwned" not in "".join(calls)


def test_a_head_cannot_leave_its_line_of_a_card(classifiers, tmp_path):
    _, folders = classifiers
    shutil.copytree(folders[0], tmp_path / "a")
    (tmp_path / "a" / "heads").mkdir()
    facts = {"head": json.dumps({"labels": ["x`\n# pwned", "y"]})}
    save_file({"weight": torch.ones(2, 4)}, tmp_path / "a" / "heads" / "b`\n# pwned.safetensors", facts)
    text = card_of(tmp_path / "a", "a", {}) or ""
    assert "pwned" in text and "\n# pwned" not in text
    assert all(line.count("`") % 2 == 0 for line in text.splitlines() if "pwned" in line and line.startswith("-"))
